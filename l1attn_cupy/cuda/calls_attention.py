"""Fused attention in terms of launches, for whatever can launch kernels: a GPU or the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import arrays
from ..plan import ArraySpec, broadcast_dims
from ..plan_attention import AttentionPlan
from . import launch_attention
from .calls import Machine

#: Arrays whose rows kernels want contiguous, and along which dimension a packed one is cut into sequences.
_ROWS = ("query", "key", "value", "grad_out", "softmax")
_OF_KEY = ("key", "value", "dkey", "dvalue")


def attention_forward(
    machine: Machine, plan: AttentionPlan, given: Mapping[str, Any | None], out: Any, softmax: Any
) -> None:
    """Write ``out``, in its dtype, and ``softmax``; neither L nor a batch dimension is 0.

    ``given`` has query, key, value and mask, and beside query and key of bytes quant_scale; the last two may be None.
    """
    everything = {**given, "out": out, "softmax": softmax}
    for segment in plan.sequences.tolist():
        part, arrays_of, specs = _cut(plan, everything, segment)
        if part.length_q == 0:
            continue
        written = {name: arrays_of.pop(name) for name in ("out", "softmax")}
        if launch_attention.splits(part) == 1:
            machine(launch_attention.attention_forward(part, specs), arrays_of, written)
        else:
            _forward_in_parts(machine, part, arrays_of, specs, written)


def attention_quantized(
    machine: Machine,
    plan: AttentionPlan,
    given: tuple[Any, Any, Any, Any | None, Any | None],
    out: Any,
    softmax: Any,
) -> None:
    """The same for 8-bit query and key, by kernels to which all else is float32.

    ``given`` is query, key, value, mask and quant_scale.
    """
    query, key, value, mask, quant_scale = given
    if mask is not None and arrays.describe(mask).dtype != "bool":
        mask = arrays.converted(mask, "float32")
    value = arrays.converted(value, "float32")
    named = {"query": query, "key": key, "value": value, "mask": mask, "quant_scale": quant_scale}
    if arrays.describe(out).dtype == "float32":
        attention_forward(machine, plan, named, out, softmax)
        return
    unrounded = arrays.empty(tuple(out.shape), out, "float32")
    attention_forward(machine, plan, named, unrounded, softmax)
    arrays.assign(out, unrounded)


def _forward_in_parts(
    machine: Machine,
    plan: AttentionPlan,
    given: Mapping[str, Any],
    specs: Mapping[str, ArraySpec],
    written: Mapping[str, Any],
) -> None:
    """One sequence, the keys of which are shared by many blocks."""
    of_one = launch_attention.parts(plan)
    lead = (launch_attention.splits(plan),)
    parts = {name: arrays.empty(lead + spec.shape, given["query"], spec.dtype) for name, spec in of_one.items()}
    machine(launch_attention.attention_forward(plan, {**specs, **of_one}), given, parts)
    merged = {name: specs[name] for name in written} | {f"{name}_parts": spec for name, spec in of_one.items()}
    merge = launch_attention.attention_merge(plan, merged)
    machine(merge, {f"{name}_parts": array for name, array in parts.items()}, written)


def attention_backward(
    machine: Machine, plan: AttentionPlan, given: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Write ``wanted``, of dquery, dkey, dvalue and dmask.

    ``given`` has query, key, value, mask, grad_out, out, softmax and grad_lse; mask and grad_lse may be None.
    """
    names = ("query", "key", "value", "mask", "grad_out", "softmax")
    given = {**{name: given[name] for name in names}, "delta": _delta(plan, given)}
    for gradient in wanted.values():
        if plan.packed:
            gradient[...] = 0  # sequences without a query or without a key reach no kernel
    together = broadcast_dims(plan.key, plan.batch) == broadcast_dims(plan.value, plan.batch)
    groups = [("dquery", ""), *([("dkey", "dvalue")] if together else [("dkey", ""), ("", "dvalue")])]
    for segment in plan.sequences.tolist():
        part, arrays_of, specs = _cut(plan, {**given, **wanted}, segment)
        if 0 in (part.length_q, part.length_k):
            continue
        inputs = {name: array for name, array in arrays_of.items() if name not in wanted}
        for dx, dxv in groups:
            written = {name: arrays_of[name] for name in (dx, dxv) if name in arrays_of}
            if any(0 not in array.shape for array in written.values()):
                call = launch_attention.attention_backward(part, specs, dx, dxv)
                machine(call, inputs, written)
        if "dmask" in arrays_of:
            call = launch_attention.attention_mask_gradient(part, specs)
            machine(call, inputs, {"dmask": arrays_of["dmask"]})


def _delta(plan: AttentionPlan, given: Mapping[str, Any]) -> Any:
    """``sum_c grad_out[..., c] * out[..., c] - grad_lse``, for each query."""
    delta = arrays.sum_of_products(given["grad_out"], given["out"], plan.lse_dtype)
    if given["grad_lse"] is not None:
        delta -= given["grad_lse"]
    return delta


def _cut(
    plan: AttentionPlan, everything: Mapping[str, Any], segment: list[int]
) -> tuple[AttentionPlan, dict[str, Any], dict[str, ArraySpec]]:
    """One sequence: a plan for it, its arrays with contiguous rows, and these as kernels see them."""
    first_q, end_q, first_k, end_k = segment
    found: dict[str, Any] = {}
    specs: dict[str, ArraySpec] = {}
    for name, array in everything.items():
        if array is None:
            continue
        if name in _ROWS:
            array = arrays.with_contiguous_rows(array)
        rows = slice(first_k, end_k) if name in _OF_KEY else slice(first_q, end_q)
        if plan.packed:
            array = array[:, rows]
        found[name] = array
        specs[name] = plan.seen_by_kernels(name, arrays.describe(array))
    part = plan._replace(query=specs["query"], key=specs["key"], value=specs["value"], segments=None)
    return part, found, specs
