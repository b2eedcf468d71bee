"""Fused attention as PyTorch operators (``torch.ops.l1attn``) under a thin autograd Function; see `autograd`.

Packed sequences come here with heads before lengths, as views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from . import arrays, autograd, plan_attention, run_attention
from .autograd import _dispatches, _library, _of_backward, _spec
from .plan_attention import OPTIONAL, AttentionOptions, AttentionPlan

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_OPTIONS = (
    "bool enable_gqa, int window_left, int window_right, str score, float scale, float eps, str? backend, str? variant"
)
_library.define(f"attention({_INPUTS}, bool keep, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor softmax, Tensor? grad_lse, bool need_query, "
    f"bool need_key, bool need_value, bool need_mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

_Optional = torch.Tensor | None


def _plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Optional,
    ends_q: _Optional,
    ends_k: _Optional,
    options: tuple,
) -> AttentionPlan:
    segments = None
    if ends_q is not None and ends_k is not None:
        ends = arrays.integers("cu_seqlens_q", ends_q), arrays.integers("cu_seqlens_k", ends_k)
        segments = plan_attention.segments(*ends, query.shape[-2], key.shape[-2])
    specs = [None if x is None else arrays.describe(x) for x in (query, key, value, mask)]
    return plan_attention.attention(specs, AttentionOptions(*options), segments)


def _resolved(*given: _Optional) -> list[Any]:
    """Without the negative bit: their memory holds their numbers."""
    return [None if array is None else array.resolve_neg() for array in given]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Optional,
    ends_q: _Optional,
    ends_k: _Optional,
    keep: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out; softmax as in `run_attention`; and, to ``keep``, out unrounded, which is empty where it is out itself."""
    query, key, value, mask = _resolved(query, key, value, mask)
    call = _plan(query, key, value, mask, ends_q, ends_k, options)
    out, softmax, unrounded = run_attention.attention(call, query, key, value, mask, keep)
    return out, softmax, softmax.new_empty(0) if unrounded is None else unrounded


def _attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Optional,
    ends_q: _Optional,
    ends_k: _Optional,
    out: torch.Tensor,
    softmax: torch.Tensor,
    grad_lse: _Optional,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    needed, options = rest[:4], rest[4:]
    query, key, value, mask = _resolved(query, key, value, mask)
    grad_out, out, softmax, grad_lse = _resolved(grad_out, out, softmax, grad_lse)
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
    mask: _Optional,
    ends_q: _Optional,
    ends_k: _Optional,
    keep: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own = -3 if options[0] else -2  # with enable_gqa, heads do not broadcast
    batch = torch.broadcast_shapes(*(array.shape[:own] for array in (query, key, value)))
    rows = (*batch, *query.shape[own:-1])
    summed = torch.float64 if query.dtype is torch.float64 else torch.float32
    shape, packed = (*rows, value.shape[-1]), ends_q is not None
    softmax = query.new_empty((*rows, 2), dtype=summed)
    rounded = query.dtype not in (torch.float32, torch.float64)
    unrounded = _fake_like(query, shape, packed, summed) if keep and rounded else softmax.new_empty(0)
    return _fake_like(query, shape, packed), softmax, unrounded


def _fake_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Optional,
    ends_q: _Optional,
    ends_k: _Optional,
    out: torch.Tensor,
    softmax: torch.Tensor,
    grad_lse: _Optional,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    arrays_needed = zip((query, key, value, mask), rest[:4], strict=True)
    return tuple(
        _fake_like(array, array.shape, ends_q is not None) if need and array is not None else query.new_empty(0)
        for array, need in arrays_needed
    )


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_backward", _attention_backward, _device)
torch.library.register_fake("l1attn::attention", _fake_attention, lib=_library)
torch.library.register_fake("l1attn::attention_backward", _fake_attention_backward, lib=_library)


class _Attention(torch.autograd.Function):
    """Saves its inputs, softmax, and out before it was rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: _Optional,
        ends_q: _Optional,
        ends_k: _Optional,
        options: tuple,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, softmax, unrounded = torch.ops.l1attn.attention(query, key, value, mask, ends_q, ends_k, True, *options)
        rounded = query.dtype not in (torch.float32, torch.float64)
        ctx.save_for_backward(query, key, value, mask, ends_q, ends_k, unrounded if rounded else out, softmax)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, arrays.log_sum_exp(softmax)

    @staticmethod
    def backward(ctx: Any, grad_out: _Optional, grad_lse: _Optional) -> tuple[_Optional, ...]:
        nothing = (None,) * 7
        if grad_out is None and grad_lse is None:
            return nothing
        *inputs, out, softmax = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        grad_out = torch.zeros_like(out, dtype=inputs[0].dtype) if grad_out is None else grad_out
        with torch.no_grad():
            options = _of_backward(ctx.options, "attention_backward")
            gradients = torch.ops.l1attn.attention_backward(
                grad_out, *inputs, out, softmax, grad_lse, *needed, *options
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            sources = [array for array in (grad_out, grad_lse, *inputs[:4]) if array is not None]
            gradients = [_NotDifferentiable.apply(array, *sources) for array in gradients]
        return *(array if need else None for array, need in zip(gradients, needed, strict=True)), None, None, None


class _NotDifferentiable(autograd._NotDifferentiable):
    """With the message of attention."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "the gradient of l1_attention cannot be differentiated: its double backward is not built; differentiate "
            "softmax(l1_scores(query, key)) @ value where its own is"
        )


def _check(
    given: Mapping[str, Any],
    options: AttentionOptions,
    saved: Mapping[str, Any] | None = None,
    always: bool = False,
) -> None:
    """Raise what `plan_attention` has to say, where the operators would not be reached to say it, or always."""
    everything = {**given, **(saved or {})}
    present = {name: array for name, array in everything.items() if array is not None or name not in OPTIONAL}
    if not always and all(map(_dispatches, present.values())):
        return
    specs = {name: _spec(name, array) if name in present else None for name, array in everything.items()}
    call = plan_attention.attention([specs[name] for name in given], options)
    if saved is not None:
        plan_attention.attention_backward(call, *(specs[name] for name in saved))


def _apply(
    query: Any, key: Any, value: Any, mask: Any, ends_q: Any, ends_k: Any, options: AttentionOptions, return_lse: bool
) -> tuple[torch.Tensor, _Optional]:
    """Through the Function where something must be differentiated, otherwise straight to the operator."""
    given = [array for array in (query, key, value, mask) if array is not None]
    tracked = torch.is_grad_enabled() and any(array.requires_grad for array in given)
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice, as in self-attention
        query, key, value, mask, ends_q, ends_k = (
            None if array is None else array.view_as(array) for array in (query, key, value, mask, ends_q, ends_k)
        )
    if tracked or forward_ad._current_level >= 0:  # the Function refuses tangents, the operator would drop them
        return _Attention.apply(query, key, value, mask, ends_q, ends_k, tuple(options))
    out, softmax, _ = torch.ops.l1attn.attention(query, key, value, mask, ends_q, ends_k, False, *options)
    return out, arrays.log_sum_exp(softmax) if return_lse else None


def attention(
    query: Any, key: Any, value: Any, mask: Any | None, options: AttentionOptions, return_lse: bool
) -> tuple[torch.Tensor, _Optional]:
    """`l1attn_cupy.l1_attention` for torch tensors; lse may be None if it is not wanted."""
    if not torch.compiler.is_compiling():
        _check({"query": query, "key": key, "value": value, "attn_mask": mask}, options)
    return _apply(query, key, value, mask, None, None, options, return_lse)


def attention_backward(
    given: Mapping[str, Any], saved: Mapping[str, Any], return_dmask: bool, options: AttentionOptions
) -> tuple[torch.Tensor, ...]:
    """`l1attn_cupy.l1_attention_backward` for torch tensors: all four gradients; not itself differentiable."""
    if not torch.compiler.is_compiling():
        _check(given, options, saved=saved, always=True)
    mask = given["attn_mask"]
    plan_attention.check_dmask(None if mask is None else _spec("attn_mask", mask), return_dmask)
    summed = "float64" if given["query"].dtype is torch.float64 else "float32"
    with torch.no_grad():
        return torch.ops.l1attn.attention_backward(
            saved["grad_out"],
            *given.values(),
            None,
            None,
            saved["out"],
            arrays.softmax_of(saved["lse"], summed),
            saved["grad_lse"],
            *(True, True, True, return_dmask),
            *options,
        )


def attention_varlen(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, options: AttentionOptions, return_lse: bool
) -> tuple[torch.Tensor, _Optional]:
    """`l1attn_cupy.l1_attention_varlen` for torch tensors; lse may be None if it is not wanted."""
    given = {"query": query, "key": key, "value": value}
    if not torch.compiler.is_compiling():
        for name, array in given.items():
            plan_attention.check_packed(name, _spec(name, array).shape)
        cu_seqlens_q = arrays.integers("cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = arrays.integers("cu_seqlens_k", cu_seqlens_k)
    ends_q, ends_k = torch.as_tensor(cu_seqlens_q), torch.as_tensor(cu_seqlens_k)
    q, k, v = (array.swapaxes(0, 1) for array in given.values())
    if not torch.compiler.is_compiling():
        _check({"query": q, "key": k, "value": v, "attn_mask": None}, options)
    out, lse = _apply(q, k, v, None, ends_q, ends_k, options, return_lse)
    return out.swapaxes(0, 1), lse
