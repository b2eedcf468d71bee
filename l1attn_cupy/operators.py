"""L1 scores as PyTorch operators, ``torch.ops.l1attn``: what they compute, without data too, and under `torch.vmap`.

`torch.compile` and `torch.export` trace through them by their fake implementations. `autograd` differentiates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import arrays, plan, run
from .plan import Plan

library = torch.library.Library("l1attn", "DEF")  # lives as long as the process
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_OPTIONS = "str score, float scale, float eps, str? backend, str? variant"
library.define(f"scores(Tensor query, Tensor key, {_OPTIONS}) -> Tensor", tags=TAGS)
library.define(
    "scores_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor? scores, bool need_query, bool need_key, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "scores_jvp(Tensor query, Tensor key, Tensor tangent_query, Tensor tangent_key, Tensor? scores, "
    f"{_OPTIONS}) -> Tensor",
    tags=TAGS,
)


def _plan(query: torch.Tensor, key: torch.Tensor, options: tuple) -> Plan:
    return plan.cached_scores(arrays.describe(query), arrays.describe(key), *options)


def scores(query: torch.Tensor, key: torch.Tensor, *options: Any) -> torch.Tensor:
    """What ``torch.ops.l1attn.scores`` computes of tensors with data."""
    return run.scores(_plan(query, key, options), query, key)


def scores_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of that name; a gradient that is not needed is empty."""
    call = _plan(query, key, options)
    dquery, dkey = run.scores_backward(call, grad, query, key, scores, need_query, need_key)
    return query.new_empty(0) if dquery is None else dquery, key.new_empty(0) if dkey is None else dkey


def scores_jvp(
    query: torch.Tensor,
    key: torch.Tensor,
    tangent_query: torch.Tensor,
    tangent_key: torch.Tensor,
    scores: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    """The operator of that name."""
    return run.scores_jvp(_plan(query, key, options), query, key, tangent_query, tangent_key, scores)


def broadcast(batches: Sequence[Any], planned: Callable[[], Any]) -> Any:
    """Batch dimensions as torch broadcasts them, of sizes that depend on data too; errors are those of ``planned``."""
    try:
        return torch.broadcast_shapes(*batches)
    except RuntimeError:
        return planned()


def _fake_scores(query: torch.Tensor, key: torch.Tensor, *options: Any) -> torch.Tensor:
    plan.check_matrix("query", tuple(query.shape))
    plan.check_matrix("key", tuple(key.shape))
    shapes = tuple(query.shape), tuple(key.shape)
    batch = broadcast([shape[:-2] for shape in shapes], lambda: plan.broadcast_batch(*shapes))
    return query.new_empty(*batch, query.shape[-2], key.shape[-2])


def _fake_scores_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
    )


def _fake_scores_jvp(
    query: torch.Tensor,
    key: torch.Tensor,
    tangent_query: torch.Tensor,
    tangent_key: torch.Tensor,
    scores: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    return _fake_scores(query, key)


for _device in ("CPU", "CUDA"):
    library.impl("scores", scores, _device)
    library.impl("scores_backward", scores_backward, _device)
    library.impl("scores_jvp", scores_jvp, _device)
torch.library.register_fake("l1attn::scores", _fake_scores, lib=library)
torch.library.register_fake("l1attn::scores_backward", _fake_scores_backward, lib=library)
torch.library.register_fake("l1attn::scores_jvp", _fake_scores_jvp, lib=library)


def _vmap_scores(info: Any, in_dims: tuple, query: torch.Tensor, key: torch.Tensor, *options: Any) -> Any:
    for name, array, dim in (("query", query, in_dims[0]), ("key", key, in_dims[1])):
        plan.check_matrix(name, own_shape(array, dim))
    query, key = with_batch_first(info.batch_size, in_dims, (query, key))
    return torch.ops.l1attn.scores(query, key, *options), 0


def _vmap_scores_backward(info: Any, in_dims: tuple, grad: torch.Tensor, *rest: Any) -> Any:
    (query, key, scores), needed, options = rest[:3], rest[3:5], rest[5:]
    given = with_batch_first(info.batch_size, in_dims, (grad, query, key, scores))
    gradients = torch.ops.l1attn.scores_backward(*given, *needed, *options)
    dims = tuple(0 if need else None for need in needed)
    return as_shaped(gradients, (query, key), in_dims[1:3], dims, info.batch_size), dims


def _vmap_scores_jvp(info: Any, in_dims: tuple, *rest: Any) -> Any:
    given = with_batch_first(info.batch_size, in_dims, rest[:5])
    return torch.ops.l1attn.scores_jvp(*given, *rest[5:]), 0


def as_shaped(
    gradients: Sequence[torch.Tensor], given: Sequence[Any], in_dims: Sequence[int | None], dims: Sequence, size: int
) -> tuple[torch.Tensor, ...]:
    """Gradients without the dimensions that `with_batch_first` put between the batch and an array's own."""
    found = []
    for gradient, array, own, dim in zip(gradients, given, in_dims, dims, strict=True):
        if dim is None:
            found.append(gradient)
            continue
        found.append(gradient.reshape(size, *own_shape(array, own)))
    return tuple(found)


def own_shape(array: torch.Tensor, dim: int | None) -> tuple[int, ...]:
    """Without the dimension that is mapped over."""
    shape = tuple(array.shape)
    return shape if dim is None else shape[:dim] + shape[dim + 1 :]


def with_batch_first(size: int, in_dims: Sequence[int | None], given: Sequence[Any]) -> list[Any]:
    """Arrays with the dimension that is mapped over in front, and as many others; None stays.

    An array without it is expanded, without a copy, so that its gradient is one for each entry.
    """
    own = [None if x is None else len(own_shape(x, dim)) for x, dim in zip(given, in_dims, strict=False)]
    most = max(n for n in own if n is not None)
    found = []
    for x, dim, n in zip(given, in_dims, own, strict=False):
        if x is not None and n is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.reshape(size, *(1,) * (most - n), *x.shape[1:])
        found.append(x)
    return found


torch.library.register_vmap("l1attn::scores", _vmap_scores, lib=library)
torch.library.register_vmap("l1attn::scores_backward", _vmap_scores_backward, lib=library)
torch.library.register_vmap("l1attn::scores_jvp", _vmap_scores_jvp, lib=library)
