"""Fused attention from a checked plan to results, as `run` does for the scores."""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

from . import arrays, plan_attention
from .plan import Shape
from .plan_attention import AttentionPlan


@functools.lru_cache(maxsize=8)
def _backend(name: str) -> ModuleType:
    return importlib.import_module(f".{name}.attention_backend", __package__)


def attention(call: AttentionPlan, query: Any, key: Any, value: Any, mask: Any | None) -> tuple[Any, Any]:
    """out, shape ``call.out_shape``, and lse, shape ``call.lse_shape``."""
    out = _new(call, call.out_shape, query)
    lse = arrays.empty(call.lse_shape, query, call.lse_dtype)
    if 0 not in call.lse_shape:
        _backend(call.options.backend).attention_forward(call, query, key, value, mask, out, lse)
    return out, lse


def attention_backward(
    call: AttentionPlan,
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None,
    out: Any,
    lse: Any,
    grad_lse: Any | None,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Any | None, ...]:
    """The gradients of query, key, value and mask that are needed."""
    plan_attention.attention_backward(
        call, *map(arrays.describe, (grad_out, out, lse)), None if grad_lse is None else arrays.describe(grad_lse)
    )
    given = {"query": query, "key": key, "value": value, "mask": mask}
    wanted = {
        f"d{name}": _new(call, tuple(array.shape), array)
        for (name, array), need in zip(given.items(), needed, strict=True)
        if need
    }
    if 0 in (math.prod(call.batch), call.length_q, call.length_k):
        for gradient in wanted.values():
            gradient[...] = 0
    elif wanted:
        given |= {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
        _backend(call.options.backend).attention_backward(call, given, wanted)
    return tuple(wanted.get(f"d{name}") for name in ("query", "key", "value", "mask"))


def _new(call: AttentionPlan, shape: Shape, like: Any) -> Any:
    """A new array; if packed, in memory heads come after lengths."""
    if not call.packed:
        return arrays.empty(shape, like)
    heads, length, channels = shape
    return arrays.empty((length, heads, channels), like).swapaxes(0, 1)
