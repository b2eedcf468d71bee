"""L1 scores of 8-bit query and key as a PyTorch operator; as `operators`, of which it uses the parts. No gradients."""

from __future__ import annotations

from typing import Any

import torch

from . import arrays, plan, plan_quantized, run
from .autograd import dispatches, spec_of
from .operators import _OPTIONS, TAGS, broadcast, library, own_shape, with_batch_first

library.define(f"scores_quantized(Tensor query, Tensor key, Tensor? quant_scale, {_OPTIONS}) -> Tensor", tags=TAGS)

Optional = torch.Tensor | None


def _scores(query: torch.Tensor, key: torch.Tensor, quant_scale: Optional, *options: Any) -> torch.Tensor:
    quant_scale = None if quant_scale is None else quant_scale.resolve_neg()
    scales = None if quant_scale is None else arrays.describe(quant_scale)
    call = plan_quantized.cached_scores(arrays.describe(query), arrays.describe(key), scales, *options)
    return run.scores_quantized(call, query, key, quant_scale)


def _fake_scores(query: torch.Tensor, key: torch.Tensor, quant_scale: Optional, *options: Any) -> torch.Tensor:
    plan.check_matrix("query", tuple(query.shape))
    plan.check_matrix("key", tuple(key.shape))
    shapes = tuple(query.shape), tuple(key.shape)
    batch = broadcast([shape[:-2] for shape in shapes], lambda: plan.broadcast_batch(*shapes))
    return query.new_empty(*batch, query.shape[-2], key.shape[-2], dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    library.impl("scores_quantized", _scores, _device)
torch.library.register_fake("l1attn::scores_quantized", _fake_scores, lib=library)


def _vmap_scores(info: Any, in_dims: tuple, *given: Any) -> tuple[torch.Tensor, int]:
    for name, array, dim in zip(("query", "key"), given, in_dims, strict=False):
        plan.check_matrix(name, own_shape(array, dim))
    return torch.ops.l1attn.scores_quantized(*with_batch_first(info.batch_size, in_dims, given[:3]), *given[3:]), 0


torch.library.register_vmap("l1attn::scores_quantized", _vmap_scores, lib=library)


def l1_scores(query: Any, key: Any, quant_scale: Any | None, *options: Any) -> torch.Tensor:
    """`l1attn_cupy.l1_scores` for 8-bit tensors."""
    given = {"query": query, "key": key} | ({} if quant_scale is None else {"quant_scale": quant_scale})
    if not torch.compiler.is_compiling():
        options = plan.option_types(*options)
        if not all(map(dispatches, given.values())):
            scales = None if quant_scale is None else spec_of("quant_scale", quant_scale)
            plan_quantized.scores((spec_of("query", query), spec_of("key", key), scales), *options)
    check_no_gradient(given)
    return torch.ops.l1attn.scores_quantized(query, key, quant_scale, *options)


def check_no_gradient(given: dict[str, torch.Tensor]) -> None:
    """Raise for what somebody would differentiate by."""
    if torch.is_grad_enabled():
        plan_quantized.check_no_gradient(**{name: array.requires_grad for name, array in given.items()})
