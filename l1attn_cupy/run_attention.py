"""Fused attention from a checked plan to results, as `run` does for the scores.

``softmax``, shape (..., L, 2), is what tells how the softmax of a row was taken: its largest masked score, and the sum
of ``exp(score - largest)``. Their log-sum-exp in one number would be too coarse to take gradients from where the
largest is large. Both are in the dtype of accumulation.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from . import arrays, plan_attention, plan_quantized
from .plan import Shape
from .plan_attention import AttentionPlan

_GRADIENTS = ("dquery", "dkey", "dvalue", "dmask")


@functools.lru_cache(maxsize=8)
def _backend(name: str) -> ModuleType:
    return importlib.import_module(f".{name}.attention_backend", __package__)


def check_variant(call: AttentionPlan) -> None:
    """Raise, where no kernel is reached, what the choice of one would."""
    if call.options.variant is not None:
        from .cuda import registry

        sizes = {"q": call.length_q, "k": call.length_k, "e": call.channels, "v": call.channels_v}
        registry.choose("attention_forward", call.query.dtype, sizes, call.options.variant)


def attention(
    call: AttentionPlan, query: Any, key: Any, value: Any, mask: Any | None, keep: bool = False
) -> tuple[Any, Any, Any | None]:
    """out, shape ``call.out_shape``; softmax; and, to ``keep`` for a backward pass, out unrounded if it was rounded."""
    out = _new(call, call.out_shape, query)
    softmax = arrays.empty(call.softmax_shape, query, call.lse_dtype)
    rounded = call.query.dtype not in ("float32", "float64")
    unrounded = _new(call, call.out_shape, query, call.lse_dtype) if keep and rounded else None
    if 0 not in call.lse_shape:
        written = out if unrounded is None else unrounded
        _backend(call.options.backend).attention_forward(call, query, key, value, mask, written, softmax)
        if unrounded is not None:
            arrays.assign(out, unrounded)
    return out, softmax, unrounded


def attention_quantized(given: tuple[Any, ...], options: plan_attention.AttentionOptions) -> tuple[Any, Any]:
    """out, in value's dtype, and softmax of 8-bit query and key.

    ``given`` is query, key, value, mask and quant_scale; the last two may be None.
    """
    specs = [None if array is None else arrays.describe(array) for array in given]
    call, quantized = plan_quantized.attention(specs, options)
    out, softmax = arrays.empty(call.out_shape, given[2]), arrays.empty(call.softmax_shape, given[2], call.lse_dtype)
    if 0 not in call.lse_shape:
        _backend(call.options.backend).attention_quantized(call, quantized, given, out, softmax)
    return out, softmax


def attention_backward(
    call: AttentionPlan,
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None,
    out: Any,
    softmax: Any,
    grad_lse: Any | None,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Any | None, ...]:
    """The gradients of query, key, value and mask that are needed; out is best not rounded."""
    plan_attention.check_dmask(call.mask, needed[3], "need_mask")
    specs = _described(grad_out, out, softmax, grad_lse)
    plan_attention.check_saved(call.without_segments, *specs)
    given = {"query": query, "key": key, "value": value, "mask": mask}
    names = zip(_GRADIENTS, given.values(), needed, strict=True)
    wanted = {name: _new(call, tuple(array.shape), array) for name, array, need in names if need}
    if 0 in call.lse_shape or call.length_k == 0:
        for gradient in wanted.values():
            gradient[...] = 0
    elif wanted:
        given |= {"grad_out": grad_out, "out": out, "softmax": softmax, "grad_lse": grad_lse}
        _backend(call.options.backend).attention_backward(call, specs, given, wanted)
    return tuple(map(wanted.get, _GRADIENTS))


def check_backward(call: AttentionPlan, grad_out: Any, out: Any, lse: Any, grad_lse: Any | None) -> None:
    """Raise what `plan_attention.attention_backward` has to say."""
    plan_attention.attention_backward(call.without_segments, *_described(grad_out, out, lse, grad_lse))


def _described(*given: Any | None) -> tuple[Any, ...]:
    return tuple([None if array is None else arrays.describe(array) for array in given])


def _new(call: AttentionPlan, shape: Shape, like: Any, dtype: str | None = None) -> Any:
    """A new array; if packed, in memory heads come after lengths."""
    if not call.packed:
        return arrays.empty(shape, like, dtype)
    heads, length, channels = shape
    return arrays.empty((length, heads, channels), like, dtype).swapaxes(0, 1)
