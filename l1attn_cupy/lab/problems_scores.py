"""How the lab checks and times `scores_forward`, `scores_quantized` and `scores_backward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import l1attn_cupy as l1

from .. import reference, testing
from ..cuda.registry import Variant
from ..testing import Agreement, Expected
from .problem import Op, Problem, options, place, special


def _scores_forward(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    query, key, _ = _inputs(problem, dtype)
    chosen = options(problem)
    arrays = (place(tensor, backend, problem) for tensor in (query, key))
    result = l1.l1_scores(*arrays, backend=backend, variant=variant.name, **chosen)
    return [Expected(query, key, **chosen).scores(result.cpu(), variant.f16_differences)]


def _scores_quantized(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    """NaN and infinity do not come to a kernel for bytes."""
    query, key, _ = _inputs(problem._replace(kind="ties") if problem.kind == "special" else problem, "float32")
    query, key, quant_scale = l1.quantize_for_l1(query, key, dtype=dtype)  # one scale, as all batch dimensions meet
    chosen = options(problem)
    q, k, scales = (place(tensor, backend, problem) for tensor in (query, key, quant_scale))
    result = l1.l1_scores(q, k, quant_scale=scales, backend=backend, variant=variant.name, **chosen)
    chosen["scale"] *= quant_scale.item()
    return [Expected(query.float(), key.float(), **chosen).scores(result.cpu())]


def _scores_backward(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    query, key, grad = _inputs(problem, dtype)
    chosen = options(problem)
    saved = reference.l1_scores(query, key, **chosen).to(query.dtype)
    *arrays, scores = (place(tensor, backend, problem) for tensor in (grad, query, key, saved))
    results = l1.l1_scores_backward(*arrays, scores=scores, backend=backend, variant=variant.name, **chosen)
    dquery, dkey = (result.cpu() for result in results)
    if problem.kind != "special":
        return list(Expected(query, key, grad, **chosen).gradients(dquery, dkey))
    exact = reference.l1_scores_backward(grad, query, key, **chosen)
    return [
        special(name, result, one) for name, result, one in zip(("dquery", "dkey"), (dquery, dkey), exact, strict=True)
    ]


def _inputs(problem: Problem, dtype: str) -> Sequence[torch.Tensor]:
    """Query, key and gradient of the scores."""
    length_q, length_k, channels = problem.sizes
    batch_q: tuple[int, ...]
    batch_q, batch_k = ((3, 1), (1, 2)) if problem.kind == "broadcast" else ((1,), (1,))
    shapes = (*batch_q, length_q, channels), (*batch_k, length_k, channels)
    query, key, grad = testing.inputs(*shapes, dtype, ties=problem.kind in ("ties", "special"))
    if problem.kind == "special":
        for at, value in enumerate((torch.inf, -torch.inf, torch.nan)):
            query[0, at % length_q, at % channels] = value
            key[-1, (at + 3) % length_k, (at + 2) % channels] = value
    return query, key, grad


def _prepare_forward(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    query, key, _ = _on_gpu(dtype, shape)
    return lambda: l1.l1_scores(query, key, variant=name)


def _prepare_quantized(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    query, key, _ = _on_gpu("float32", shape)
    query, key, quant_scale = l1.quantize_for_l1(query, key, dtype=dtype)
    return lambda: l1.l1_scores(query, key, quant_scale=quant_scale, variant=name)


def _prepare_backward(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    query, key, grad = _on_gpu(dtype, shape)
    saved = l1.l1_scores(query, key)
    return lambda: l1.l1_scores_backward(grad, query, key, scores=saved, variant=name)


def _numbers_forward(shape: Sequence[int]) -> int:
    """Query, key, scores."""
    batch, length_q, length_k, channels = shape
    return batch * (channels * (length_q + length_k) + length_q * length_k)


def _numbers_quantized(shape: Sequence[int]) -> int:
    """The same, a score being as large as four of query and key."""
    batch, length_q, length_k, channels = shape
    return batch * (channels * (length_q + length_k) + 4 * length_q * length_k)


def _numbers_backward(shape: Sequence[int]) -> int:
    """Query, key, their gradients, scores and the gradient of these."""
    return 2 * _numbers_forward(shape)


def _on_gpu(dtype: str, shape: Sequence[int]) -> list[torch.Tensor]:
    batch, length_q, length_k, channels = shape
    inputs = testing.inputs((batch, length_q, channels), (batch, length_k, channels), dtype)
    return [tensor.cuda() for tensor in inputs]


OPS = {
    "scores_forward": Op(_scores_forward, _prepare_forward, _numbers_forward, 1, "forward", bench="forward"),
    "scores_quantized": Op(_scores_quantized, _prepare_quantized, _numbers_quantized, 1, "forward", bench="forward"),
    "scores_backward": Op(_scores_backward, _prepare_backward, _numbers_backward, 2, "backward", 1, "backward"),
}
