"""Every check of calls with 8-bit query and key, and every error message; as `plan`, of which it uses the parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import plan, plan_attention
from .plan import QUANTIZED, ArraySpec, Plan, Shape
from .plan_attention import AttentionOptions, AttentionPlan

#: Channels whose largest distance, 255 for each, a 32-bit sum holds.
MOST_CHANNELS = 2**23

#: Dtypes of value beside 8-bit query and key.
VALUES = ("float16", "bfloat16", "float32")


class Quantized(NamedTuple):
    """What there is to 8-bit query and key beside the plan of attention, which has them as if of value's dtype.

    ``quant_scale`` is a (*batch, 1, 1) as kernels see it.
    """

    dtype: str
    quant_scale: ArraySpec | None


def is_quantized(query: Any, key: Any, quant_scale: Any | None) -> bool:
    """Whether a call is for this module: one of the arrays is of bytes, or there is a scale for such."""
    return quant_scale is not None or _is_of_bytes(query) or _is_of_bytes(key)


def _is_of_bytes(array: Any) -> bool:
    return str(getattr(array, "dtype", "")).removeprefix("torch.") in QUANTIZED


def scores(
    specs: tuple[ArraySpec, ArraySpec, ArraySpec | None],
    score: str,
    scale: float,
    eps: float,
    backend: str | None,
    variant: str | None,
) -> Plan:
    """Check a call of `l1_scores` with 8-bit query and key, and quant_scale; the errors are those of its docstring."""
    return cached_scores(*specs, *plan.option_types(score, scale, eps, backend, variant))


@functools.lru_cache(maxsize=1024)
def cached_scores(
    query: ArraySpec,
    key: ArraySpec,
    quant_scale: ArraySpec | None,
    score: str,
    scale: float,
    eps: float,
    backend: str | None,
    variant: str | None,
) -> Plan:
    """`scores` for options that have passed `plan.option_types`."""
    check_bytes(query, key)
    plan.check_range(query.dtype, scale, eps)
    options = plan.check_options(score, scale, eps, backend, variant, query.device)
    batch = plan.broadcast_batch(query.shape, key.shape)
    if quant_scale is not None:
        check_quant_scale(quant_scale, query, batch)
    return Plan(query, key, batch, (*batch, query.shape[-2], key.shape[-2]), options, quant_scale)


def check_bytes(query: ArraySpec, key: ArraySpec) -> None:
    """Raise unless query and key are 8-bit and fit each other."""
    for name, spec in (("query", query), ("key", key)):
        plan.check_dense(name, spec)
        if spec.dtype not in QUANTIZED:
            raise TypeError(
                f"{name} must be int8 or uint8, as quantize_for_l1 makes it, where there is a quant_scale or the other "
                f"of query and key is, got {spec.dtype}"
            )
        plan.check_array(name, spec, dtypes=QUANTIZED)
    _check_alike(query, key)
    if query.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"query must have a head_dim of at most {MOST_CHANNELS} in {query.dtype}, got {query.shape}")


def attention(specs: Sequence[ArraySpec | None], options: AttentionOptions) -> tuple[AttentionPlan, Quantized]:
    """Check a call of `l1_attention` with 8-bit query and key, value, mask and quant_scale."""
    return _attention(*specs, options)


@functools.lru_cache(maxsize=64)
def _attention(
    query: ArraySpec,
    key: ArraySpec,
    value: ArraySpec,
    mask: ArraySpec | None,
    quant_scale: ArraySpec | None,
    options: AttentionOptions,
) -> tuple[AttentionPlan, Quantized]:
    check_bytes(query, key)
    plan.check_array("value", value, dtypes=VALUES)
    if mask is not None and mask.dtype not in ("bool", value.dtype):
        raise TypeError(f"attn_mask must be bool or have value's dtype ({value.dtype}), got {mask.dtype}")
    as_value = [spec._replace(dtype=value.dtype) for spec in (query, key)]
    call = plan_attention.attention([*as_value, value, mask], options)
    if quant_scale is not None:
        check_quant_scale(quant_scale, query, call.batch[:-1] if call.groups else call.batch)
        quant_scale = call.seen_by_kernels("quant_scale", quant_scale)
    return call, Quantized(query.dtype, quant_scale)


def check_quant_scale(quant_scale: ArraySpec, query: ArraySpec, batch: Shape) -> None:
    """Raise unless ``quant_scale`` is one number for each matrix of ``batch``, broadcast."""
    plan.check_dense("quant_scale", quant_scale)
    plan.check_same("framework", "come from the same library as query", query, quant_scale, "quant_scale")
    plan.check_same("device", "be on query's device", query, quant_scale, "quant_scale")
    if quant_scale.dtype != "float32":
        raise TypeError(f"quant_scale must have dtype float32, got {quant_scale.dtype}")
    shape = quant_scale.shape
    missing = len(batch) - (len(shape) - 2)
    fits = len(shape) >= 2 and missing >= 0
    fits = fits and all(n in (1, wanted) for n, wanted in zip(shape[:-2], batch[missing:], strict=True))
    if shape[-2:] != (1, 1) or not fits:
        raise ValueError(f"quant_scale must broadcast to the shape {(*batch, 1, 1)}, with 1, 1 at its end, got {shape}")


def check_no_gradient(**tracked: bool) -> None:
    """Raise for an array that requires a gradient, which 8-bit arrays cannot pass on."""
    for name, requires_grad in tracked.items():
        if requires_grad:
            raise TypeError(
                f"{name} must not require a gradient, as 8-bit numbers pass none on; use torch.no_grad() or "
                f"{name}.detach(), got a tensor that requires one"
            )


def quantize_types(dtype: Any, enable_gqa: Any) -> None:
    """Check the types of the options of `quantize_for_l1`."""
    if not isinstance(dtype, str):
        raise TypeError(f"dtype must be a string, got {dtype!r}")
    plan_attention.check_flag("enable_gqa", enable_gqa)


@functools.lru_cache(maxsize=256)
def quantize(query: ArraySpec, key: ArraySpec, dtype: str, enable_gqa: bool) -> None:
    """Check a call of `quantize_for_l1` whose options have passed `quantize_types`."""
    plan.check_array("query", query)
    plan.check_array("key", key)
    _check_alike(query, key)
    if dtype not in QUANTIZED:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, QUANTIZED))}, got {dtype!r}")
    batches = [spec.shape[:-2] for spec in (query, key)]
    if enable_gqa:
        _check_heads(query.shape, key.shape)
        batches = [batch[:-1] for batch in batches]
    try:
        plan.broadcast_shapes(*batches)
    except ValueError:
        raise ValueError(
            f"key must have batch dimensions that broadcast with {batches[0]} to match query {query.shape}, "
            f"got {key.shape}"
        ) from None


def _check_heads(query: Shape, key: Shape) -> None:
    for name, shape in (("query", query), ("key", key)):
        if len(shape) < 3:
            raise ValueError(
                f"{name} must have at least 3 dimensions (..., heads, length, head_dim) with enable_gqa, got {shape}"
            )
    heads = key[-3]
    if query[-3] % heads if heads else query[-3]:
        raise ValueError(f"query must have a multiple of the {heads} heads of key {key}, got {query}")


def _check_alike(query: ArraySpec, key: ArraySpec) -> None:
    plan.check_same("framework", "come from the same library as query", query, key)
    plan.check_same("dtype", "have query's dtype", query, key)
    plan.check_same("device", "be on query's device", query, key)
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have head_dim {query.shape[-1]} to match query {query.shape}, got {key.shape}")
