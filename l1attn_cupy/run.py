"""From a checked plan to results: allocate in the caller's library, call the backend."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from . import arrays, plan
from .functions import CURVED
from .plan import Plan


@functools.lru_cache(maxsize=8)
def _backend(name: str) -> ModuleType:
    return importlib.import_module(f".{name}.backend", __package__)


def _check_variant(call: Plan, op: str) -> None:
    """Empty arrays reach no kernel; a variant that does not exist is an error all the same."""
    if call.options.variant is not None:
        from .cuda import registry

        sizes = {"q": call.length_q, "k": call.length_k, "e": call.channels}
        registry.choose(op, call.query.dtype, sizes, call.options.variant)


def scores(call: Plan, query: Any, key: Any) -> Any:
    """The forward result, shape ``call.out_shape``."""
    out = arrays.empty(call.out_shape, query)
    if 0 in call.out_shape:
        _check_variant(call, "scores_forward")
        return out
    _backend(call.options.backend).scores_forward(call, query, key, out)
    return out


def scores_quantized(call: Plan, query: Any, key: Any, quant_scale: Any | None) -> Any:
    """The scores of 8-bit query and key, shape ``call.out_shape``, in float32."""
    out = arrays.empty(call.out_shape, query, call.out_dtype)
    if 0 in call.out_shape:
        _check_variant(call, "scores_quantized")
        return out
    _backend(call.options.backend).scores_quantized(call, query, key, quant_scale, out)
    return out


def scores_backward(
    call: Plan, grad: Any, query: Any, key: Any, saved: Any | None, need_query: bool = True, need_key: bool = True
) -> tuple[Any | None, Any | None]:
    """The gradients that are needed, in the shapes of query and key."""
    plan.scores_backward(call, arrays.describe(grad), None if saved is None else arrays.describe(saved))
    new = arrays.zeros if 0 in call.out_shape else arrays.empty  # without scores there is nothing to sum
    dquery = new(call.query.shape, query) if need_query else None
    dkey = new(call.key.shape, key) if need_key else None
    if 0 in (*call.out_shape, call.channels):
        _check_variant(call, "scores_backward")
        return dquery, dkey
    if call.options.score not in CURVED:
        saved = None
    _backend(call.options.backend).scores_backward(call, grad, query, key, saved, dquery, dkey)
    return dquery, dkey


def scores_jvp(call: Plan, query: Any, key: Any, tangent_query: Any, tangent_key: Any, saved: Any | None) -> Any:
    """The tangent of the scores, shape ``call.out_shape``, from those of query and key, and from the scores."""
    tangents = arrays.describe(tangent_query), arrays.describe(tangent_key)
    plan.scores_jvp(call, *tangents, None if saved is None else arrays.describe(saved))
    if 0 in (*call.out_shape, call.channels):
        _check_variant(call, "scores_jvp")
        return arrays.zeros(call.out_shape, query)
    if call.options.score not in CURVED:
        saved = None
    elif saved is None:
        saved = scores(call._replace(options=call.options._replace(variant=None)), query, key)
    out = arrays.empty(call.out_shape, query)
    _backend(call.options.backend).scores_jvp(call, query, key, tangent_query, tangent_key, saved, out)
    return out
