"""What a launch of attention consists of, as in `launch`, whose structs these extend."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..functions import SCORES
from ..plan import ArraySpec, batch_strides, broadcast_dims, collapse
from ..plan_attention import AttentionPlan
from . import registry
from .launch import _MATRIX, MAX_BATCH_DIMS, Launch, _launch, _offset, _tiles
from .registry import Variant

NO_MASK, BOOLEAN, ADDITIVE = range(3)
_MOST = 2**31 - 1

_ATTENTION = np.dtype(
    [
        *((name, _MATRIX) for name in ("query", "key", "value", "mask", "lse")),
        ("mask_column", "i8"),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("length_q", "length_k", "channels", "channels_v", "score", "mask_kind")),
        *((name, "i4") for name in ("left", "right")),
        *((name, "f8") for name in ("scale", "eps")),
    ],
    align=True,
)
_FORWARD = np.dtype([("a", _ATTENTION), ("out", _MATRIX)], align=True)
_BACKWARD = np.dtype(
    [
        ("a", _ATTENTION),
        *((name, _MATRIX) for name in ("out", "grad_out", "grad_lse", "dx", "dxv")),
        *((name, "i4") for name in ("kept", "summed", "of_key", "unused")),
    ],
    align=True,
)
_SHARED = ("query", "key", "value", "mask", "lse")


def attention_forward(plan: AttentionPlan, specs: Mapping[str, ArraySpec]) -> Launch:
    """The launch that computes out and lse. Arrays: query, key, value, mask, out, lse, by the names of ``specs``."""
    return _forward(registry.generation(), plan, tuple(specs.items()))


def attention_backward(plan: AttentionPlan, specs: Mapping[str, ArraySpec], dx: str, dxv: str) -> Launch:
    """The launch that computes dquery, or dkey, dvalue or both: "" is one that is not wanted."""
    return _backward(registry.generation(), plan, tuple(specs.items()), dx, dxv)


@functools.lru_cache(maxsize=1024)
def _forward(_generation: int, plan: AttentionPlan, specs: tuple[tuple[str, ArraySpec], ...]) -> Launch:
    variant = _pick("attention_forward", plan)
    args, known = np.zeros((), _FORWARD), dict(specs)
    _fill(args, plan, known, {"out": "out"}, range(len(plan.batch)))
    blocks = _tiles(plan.length_q, variant, "BLOCK_Q") * max(1, _tiles(plan.channels_v, variant, "BLOCK_V"))
    places = _places(_FORWARD, {"out": "out"})
    return _launch(variant, plan, args, math.prod(plan.batch) * blocks, places)


@functools.lru_cache(maxsize=1024)
def _backward(
    _generation: int, plan: AttentionPlan, specs: tuple[tuple[str, ArraySpec], ...], dx: str, dxv: str
) -> Launch:
    variant = _pick("attention_backward", plan)
    args, known = np.zeros((), _BACKWARD), dict(specs)
    fields = {name: name for name in ("out", "grad_out", "grad_lse")} | {"dx": dx, "dxv": dxv}
    fields = {field: name for field, name in fields.items() if name in known}
    owner = plan.query if dx == "dquery" else plan.key if dx else plan.value
    shared = broadcast_dims(owner, plan.batch)
    _fill(args, plan, known, fields, sorted(range(len(shared)), key=lambda dim: shared[dim]))
    args["summed"] = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    args["kept"] = math.prod(plan.batch) // int(args["summed"])
    args["of_key"] = dx != "dquery"
    channels = plan.channels + (plan.channels_v if args["of_key"] else 0)
    tiles = _tiles(owner.shape[-2], variant, "BLOCK_X") * _tiles(channels, variant, "BLOCK_E")
    return _launch(variant, plan, args, int(args["kept"]) * tiles, _places(_BACKWARD, fields))


def _pick(op: str, plan: AttentionPlan) -> Variant:
    sizes = {"q": plan.length_q, "k": plan.length_k, "e": plan.channels}
    return registry.choose(op, plan.query.dtype, sizes, plan.options.variant)


def _fill(
    args: np.ndarray,
    plan: AttentionPlan,
    specs: Mapping[str, ArraySpec],
    fields: Mapping[str, str],
    order: Sequence[int] | range,
) -> None:
    """All but the addresses; ``fields`` tells which array each Matrix after the shared ones is."""
    shared = args["a"]
    names = [name for name in _SHARED if name in specs]
    places = {name: (shared, name) for name in names} | {name: (args, field) for field, name in fields.items()}
    strides = [batch_strides(specs[name], plan.batch) for name in places]
    shape, strides = collapse(
        tuple(plan.batch[dim] for dim in order), [tuple(s[dim] for dim in order) for s in strides]
    )
    if len(shape) > MAX_BATCH_DIMS:
        raise ValueError(
            "query, key, value and attn_mask must have batch dimensions whose strides merge into at most "
            f"{MAX_BATCH_DIMS}, got batch {plan.batch}; call contiguous() first"
        )
    missing = MAX_BATCH_DIMS - len(shape)
    shared["batch_shape"] = (1,) * missing + shape
    for (name, (target, field)), stride in zip(places.items(), strides, strict=True):
        target[field] = (0, (0,) * missing + stride, specs[name].strides[-2])
    shared["length_q"], shared["length_k"] = plan.length_q, plan.length_k
    shared["channels"], shared["channels_v"] = plan.channels, plan.channels_v
    shared["score"], shared["scale"], shared["eps"] = (
        SCORES[plan.options.score],
        plan.options.scale,
        plan.options.eps,
    )
    shared["left"], shared["right"] = (min(n, _MOST) for n in plan.window)
    if plan.mask is not None:
        shared["mask_kind"] = BOOLEAN if plan.mask.dtype == "bool" else ADDITIVE
        shared["mask_column"] = specs["mask"].strides[-1]


def _places(struct_type: np.dtype, fields: Mapping[str, str]) -> list[tuple[str, int]]:
    """Where the address of each array goes."""
    start = _offset(struct_type, "a")
    shared = [(name, start + _offset(_ATTENTION, name)) for name in _SHARED]
    return shared + [(name, _offset(struct_type, field)) for field, name in fields.items()]
