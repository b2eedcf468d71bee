"""8-bit inputs, and what should come of them: exact integer sums, and the formula within the bound of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from l1attn_cupy import testing

DTYPES = ["int8", "uint8"]


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """All numbers of the dtype, both ends among them."""
    ends = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(ends.min, ends.max + 1, shape).astype(dtype)


def distances(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Exact, in int64."""
    return np.abs(query[..., :, None, :].astype(np.int64) - key[..., None, :, :]).sum(-1)


def assert_scores(result: Any, query: Any, key: Any, quant_scale: Any, scale: float = 1.0, **options: Any) -> None:
    """Within the bound of float32 arrays of the same numbers, for each matrix with its own scale."""
    result, query, key, quant_scale = (torch.as_tensor(x).cpu() for x in (result, query, key, quant_scale))
    batch = result.shape[:-2]
    q, k, scales = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (query.float(), key.float(), quant_scale))
    for own, one_q, one_k, factor in zip(result.flatten(0, -3), q, k, scales, strict=True):
        testing.Expected(one_q, one_k, scale=scale * factor.item(), **options).assert_scores(own)
