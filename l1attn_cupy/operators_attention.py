"""Fused attention as PyTorch operators, ``torch.ops.l1attn``; as `operators`, of which it uses the parts.

Packed sequences come here with heads before lengths, as views.
"""

from __future__ import annotations

from typing import Any

import torch

from . import arrays, plan, plan_attention, run_attention
from .operators import TAGS, as_shaped, broadcast, library, own_shape, with_batch_first
from .plan_attention import AttentionOptions, AttentionPlan

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_OPTIONS = (
    "bool enable_gqa, int window_left, int window_right, str score, float scale, float eps, str? backend, str? variant"
)
library.define(f"attention({_INPUTS}, bool keep, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", tags=TAGS)
library.define(
    f"attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor softmax, Tensor? grad_lse, bool need_query, "
    f"bool need_key, bool need_value, bool need_mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)

Optional = torch.Tensor | None


def _plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional,
    ends_q: Optional,
    ends_k: Optional,
    options: tuple,
) -> AttentionPlan:
    plan_attention.check_both_ends(ends_q, ends_k)
    segments = None
    if ends_q is not None and ends_k is not None:
        ends = arrays.integers("cu_seqlens_q", ends_q), arrays.integers("cu_seqlens_k", ends_k)
        segments = plan_attention.segments(*ends, query.shape[-2], key.shape[-2])
    specs = [None if x is None else arrays.describe(x) for x in (query, key, value, mask)]
    return plan_attention.attention(specs, AttentionOptions(*options), segments)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional,
    ends_q: Optional,
    ends_k: Optional,
    keep: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out; softmax as in `run_attention`; and, to ``keep``, out unrounded, which is empty where it is out itself."""
    call = _plan(query, key, value, mask, ends_q, ends_k, options)
    out, softmax, unrounded = run_attention.attention(call, query, key, value, mask, keep)
    return out, softmax, softmax.new_empty(0) if unrounded is None else unrounded


def attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional,
    ends_q: Optional,
    ends_k: Optional,
    out: torch.Tensor,
    softmax: torch.Tensor,
    grad_lse: Optional,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value and mask; one that is not needed is empty."""
    needed, options = rest[:4], rest[4:]
    call = _plan(query, key, value, mask, ends_q, ends_k, options)
    gradients = run_attention.attention_backward(
        call, grad_out, query, key, value, mask, out, softmax, grad_lse, (needed[0], needed[1], needed[2], needed[3])
    )
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_like(array: torch.Tensor, shape: Any, packed: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array without data, in memory as `run_attention` makes it."""
    if not packed:
        return array.new_empty(shape, dtype=dtype)
    heads, length, channels = shape
    return array.new_empty((length, heads, channels), dtype=dtype).transpose(0, 1)


def _fake_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional,
    ends_q: Optional,
    ends_k: Optional,
    keep: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own = -3 if options[0] else -2  # with enable_gqa, heads do not broadcast
    given = {"query": tuple(query.shape), "key": tuple(key.shape), "value": tuple(value.shape)}
    for name, shape in given.items():
        plan.check_matrix(name, shape)
    packed = ends_q is not None
    shown = {name: plan_attention.as_given(shape, packed) for name, shape in given.items()}
    batches = [shape[:own] for shape in given.values()]
    batch = broadcast(batches, lambda: plan_attention.broadcast_batch(batches, shown, packed))
    rows = (*batch, *query.shape[own:-1])
    summed = torch.float64 if query.dtype is torch.float64 else torch.float32
    shape = (*rows, value.shape[-1])
    softmax = query.new_empty((*rows, 2), dtype=summed)
    rounded = query.dtype not in (torch.float32, torch.float64)
    unrounded = _fake_like(query, shape, packed, summed) if keep and rounded else softmax.new_empty(0)
    return _fake_like(query, shape, packed), softmax, unrounded


def _fake_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional,
    ends_q: Optional,
    ends_k: Optional,
    out: torch.Tensor,
    softmax: torch.Tensor,
    grad_lse: Optional,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    arrays_needed = zip((query, key, value, mask), rest[:4], strict=True)
    return tuple(
        _fake_like(array, array.shape, ends_q is not None) if need and array is not None else query.new_empty(0)
        for array, need in arrays_needed
    )


for _device in ("CPU", "CUDA"):
    library.impl("attention", attention, _device)
    library.impl("attention_backward", attention_backward, _device)
torch.library.register_fake("l1attn::attention", _fake_attention, lib=library)
torch.library.register_fake("l1attn::attention_backward", _fake_attention_backward, lib=library)


def _vmap_attention(info: Any, in_dims: tuple, *given: Any) -> tuple:
    """Of a batch of packed sequences, one after another."""
    inputs, keep, options = given[:6], given[6], given[7:]
    if inputs[4] is not None:
        results = [
            torch.ops.l1attn.attention(*entry, keep, *options) for entry in _entries(info.batch_size, in_dims, inputs)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)
    for name, array, dim in zip(("query", "key", "value"), inputs, in_dims, strict=False):
        plan.check_matrix(name, own_shape(array, dim))
    inputs = (*with_batch_first(info.batch_size, in_dims, inputs[:4]), None, None)
    out, softmax, unrounded = torch.ops.l1attn.attention(*inputs, keep, *options)
    return (out, softmax, unrounded), (0, 0, 0 if unrounded.numel() else None)


def _vmap_attention_backward(info: Any, in_dims: tuple, *given: Any) -> tuple:
    own, needed, options = given[1:5], given[10:14], given[14:]
    dims = tuple(0 if need else None for need in needed)
    if given[5] is not None:
        entries = _entries(info.batch_size, in_dims, given[:10])
        results = [torch.ops.l1attn.attention_backward(*entry, *needed, *options) for entry in entries]
        stacked = zip(*results, dims, strict=True)
        return tuple(parts[0] if dim is None else torch.stack(parts) for *parts, dim in stacked), dims
    given_lse, lse_dim = given[9], in_dims[9]
    if given_lse is not None:  # as a column, like all others
        given_lse = given_lse.movedim(lse_dim, 0).unsqueeze(-1) if lse_dim is not None else given_lse.unsqueeze(-1)
        lse_dim = None if lse_dim is None else 0
    arrays_given = (*given[:9], given_lse)
    grad_out, *inputs, out, softmax, grad_lse = with_batch_first(info.batch_size, (*in_dims[:9], lse_dim), arrays_given)
    grad_lse = None if grad_lse is None else grad_lse.squeeze(-1)
    gradients = torch.ops.l1attn.attention_backward(grad_out, *inputs, out, softmax, grad_lse, *needed, *options)
    return as_shaped(gradients, own, in_dims[1:5], dims, info.batch_size), dims


def _entries(size: int, in_dims: tuple, given: tuple) -> list[list[Any]]:
    """The arguments of each entry of the dimension that is mapped over."""
    pairs = list(zip(given, in_dims[: len(given)], strict=True))
    return [[x if dim is None else x.select(dim, i) for x, dim in pairs] for i in range(size)]


torch.library.register_vmap("l1attn::attention", _vmap_attention, lib=library)
torch.library.register_vmap("l1attn::attention_backward", _vmap_attention_backward, lib=library)
