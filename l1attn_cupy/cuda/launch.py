"""What a launch consists of: the bytes of the argument struct, and the grid. The same for CUDA and the emulator.

The structs are those of ``kernels_cu/common.cuh``; `numpy.dtype` with ``align=True`` lays them out as C++ does.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from ..functions import SCORES
from ..plan import ArraySpec, Plan, Shape, batch_strides, broadcast_dims, collapse, contiguous
from ..plan_attention import AttentionPlan
from . import devices, registry, tuning
from .registry import Variant

MAX_BATCH_DIMS = 6
_MAX_BLOCKS = 2**31 - 1
_ADDRESS = struct.Struct("Q")

_NUMBER = np.dtype([("as_double", "f8"), ("as_float", "f4"), ("unused", "i4")], align=True)
_MATRIX = np.dtype([("data", "u8"), ("batch_stride", "i8", MAX_BATCH_DIMS), ("row_stride", "i8")], align=True)
_SCORES_FORWARD = np.dtype(
    [
        *((name, _MATRIX) for name in ("q", "k", "out")),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("length_q", "length_k", "channels", "score")),
        *((name, _NUMBER) for name in ("scale", "eps")),
    ],
    align=True,
)
_SCORES_QUANTIZED = np.dtype(
    [
        *((name, _MATRIX) for name in ("q", "k", "quant_scale", "out")),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("length_q", "length_k", "channels", "score")),
        *((name, _NUMBER) for name in ("scale", "eps")),
    ],
    align=True,
)
_SCORES_JVP = np.dtype(
    [
        *((name, _MATRIX) for name in ("q", "k", "tq", "tk", "scores", "out")),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("length_q", "length_k", "channels", "score")),
        *((name, _NUMBER) for name in ("scale", "eps")),
    ],
    align=True,
)
_GRADIENT = np.dtype(
    [
        *((name, _MATRIX) for name in ("x", "y", "grad", "scores", "dx")),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("kept", "summed", "length_x", "length_y", "x_is_row", "unused")),
    ],
    align=True,
)
_SCORES_BACKWARD = np.dtype(
    [
        *((name, _GRADIENT) for name in ("dq", "dk")),
        *((name, "i4") for name in ("channels", "score")),
        *((name, _NUMBER) for name in ("scale", "eps")),
    ],
    align=True,
)

#: Value of the macro DTYPE.
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3, "int8": 4, "uint8": 5}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, all but the addresses of the arrays.

    ``places`` tells at which bytes of the argument struct the address of which array goes.
    """

    variant: Variant
    source: str
    defines: tuple[tuple[str, int], ...]
    grid: int
    template: bytes
    places: tuple[tuple[str, int], ...]

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return self.variant.parameters["THREADS"]

    @property
    def shared(self) -> int:
        """As `Variant.shared`."""
        return self.variant.shared

    def arguments(self, addresses: Mapping[str, int]) -> bytearray:
        """The argument struct; an array that is not there has address 0."""
        struct_bytes = bytearray(self.template)
        for name, offset in self.places:
            _ADDRESS.pack_into(struct_bytes, offset, addresses.get(name, 0))
        return struct_bytes


def scores_forward(plan: Plan) -> Launch:
    """The launch that computes the scores; no dimension of them is 0. Arrays: query, key, out."""
    return _scores_forward(registry.generation("scores_forward"), plan)


def scores_backward(plan: Plan, grad: ArraySpec, saved: ArraySpec, need_query: bool, need_key: bool) -> Launch:
    """The launch that computes the gradients that are needed. Arrays: query, key, grad, scores, dquery, dkey."""
    return _scores_backward(registry.generation("scores_backward"), plan, grad, saved, need_query, need_key)


def scores_quantized(plan: Plan) -> Launch:
    """The launch that computes the scores of 8-bit arrays. Arrays: query, key, quant_scale, out."""
    return _scores_quantized(registry.generation("scores_quantized"), plan)


def scores_jvp(plan: Plan, tangent_query: ArraySpec, tangent_key: ArraySpec, saved: ArraySpec) -> Launch:
    """The launch that computes the tangent. Arrays: query, key, tangent_query, tangent_key, scores, out."""
    return _scores_jvp(registry.generation("scores_jvp"), plan, tangent_query, tangent_key, saved)


@functools.lru_cache(maxsize=1024)
def _scores_forward(_generation: int, plan: Plan) -> Launch:
    variant = _pick("scores_forward", plan)
    specs = {"q": plan.query, "k": plan.key, "out": contiguous(plan.query, plan.out_shape)}
    return _of_tiles(variant, plan, _SCORES_FORWARD, specs, ("query", "key", "out"))


@functools.lru_cache(maxsize=1024)
def _scores_quantized(_generation: int, plan: Plan) -> Launch:
    variant = _pick("scores_quantized", plan)
    out = contiguous(plan.query, plan.out_shape)
    specs = {"q": plan.query, "k": plan.key, "quant_scale": plan.quant_scale or out, "out": out}
    return _of_tiles(variant, plan, _SCORES_QUANTIZED, specs, ("query", "key", "quant_scale", "out"))


@functools.lru_cache(maxsize=1024)
def _scores_jvp(
    _generation: int, plan: Plan, tangent_query: ArraySpec, tangent_key: ArraySpec, saved: ArraySpec
) -> Launch:
    variant = _pick("scores_jvp", plan)
    tangents = {"tq": tangent_query, "tk": tangent_key}
    specs = {"q": plan.query, "k": plan.key, **tangents, "scores": saved, "out": contiguous(plan.query, plan.out_shape)}
    names = ("query", "key", "tangent_query", "tangent_key", "scores", "out")
    return _of_tiles(variant, plan, _SCORES_JVP, specs, names)


def _of_tiles(
    variant: Variant, plan: Plan, struct_type: np.dtype, specs: Mapping[str, ArraySpec], names: Iterable[str]
) -> Launch:
    """A launch with a block for each tile of the scores; ``names`` are those of ``specs`` outside of the struct."""
    args = np.zeros((), struct_type)
    _fill_batch(args, plan.batch, specs, range(len(plan.batch)))
    args["length_q"], args["length_k"], args["channels"] = plan.length_q, plan.length_k, plan.channels
    _fill_options(args, plan)
    blocks = _tiles(plan.length_q, variant, "BLOCK_Q") * _tiles(plan.length_k, variant, "BLOCK_K")
    places = [(name, _offset(struct_type, field)) for name, field in zip(names, specs, strict=True)]
    return _launch(variant, plan, args, math.prod(plan.batch) * blocks, places)


@functools.lru_cache(maxsize=1024)
def _scores_backward(
    _generation: int, plan: Plan, grad: ArraySpec, saved: ArraySpec, need_query: bool, need_key: bool
) -> Launch:
    variant = _pick("scores_backward", plan)
    args = np.zeros((), _SCORES_BACKWARD)
    args["channels"] = plan.channels
    _fill_options(args, plan)
    sides = (("dq", True, need_query), ("dk", False, need_key))
    blocks = [
        _fill_gradient(args[field], plan, variant, of_query, grad, saved, need) for field, of_query, need in sides
    ]
    places = []
    for side, own, other in (("dq", "query", "key"), ("dk", "key", "query")):
        start = _offset(_SCORES_BACKWARD, side)
        names = {"x": own, "y": other, "grad": "grad", "scores": "scores", "dx": f"d{own}"}
        places += [(name, start + _offset(_GRADIENT, field)) for field, name in names.items()]
    return _launch(variant, plan, args, max(blocks) if variant.atomic else sum(blocks), places)


def _offset(struct_type: np.dtype, field: str) -> int:
    """Bytes before ``field``; the address of a Matrix is its first field."""
    return cast(Mapping, struct_type.fields)[field][1]


def _fill_gradient(
    args: np.ndarray,
    plan: Plan,
    variant: Variant,
    of_query: bool,
    grad: ArraySpec,
    saved: ArraySpec,
    needed: bool,
) -> int:
    """Arguments for one gradient; returns how many blocks it takes. Atomic kernels use the lengths in any case."""
    x, y = (plan.query, plan.key) if of_query else (plan.key, plan.query)
    args["batch_shape"] = 1
    if not needed and not variant.atomic:
        return 0
    shared = (False,) * len(plan.batch) if variant.atomic else broadcast_dims(x, plan.batch)
    order = sorted(range(len(shared)), key=lambda dim: shared[dim])  # dimensions to sum over come last
    specs = {"x": x, "y": y, "grad": grad, "scores": saved, "dx": contiguous(x, x.shape)}
    _fill_batch(args, plan.batch, specs, order)
    args["kept"] = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if not sum_over)
    args["summed"] = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    args["length_x"], args["length_y"] = x.shape[-2], y.shape[-2]
    args["x_is_row"] = of_query
    if variant.atomic:
        tiles = _tiles(plan.length_q, variant, "BLOCK_Q") * _tiles(plan.length_k, variant, "BLOCK_K")
    else:
        tiles = _tiles(x.shape[-2], variant, "BLOCK_X")
    return int(args["kept"]) * tiles * _tiles(plan.channels, variant, "BLOCK_E")


def _pick(op: str, plan: Plan | AttentionPlan) -> Variant:
    """The variant for a call, with the parameters that were tuned for its device."""
    sizes = {"q": plan.length_q, "k": plan.length_k, "e": plan.channels}
    if isinstance(plan, AttentionPlan):
        sizes["v"] = plan.channels_v
    variant = registry.choose(op, plan.query.dtype, sizes, plan.options.variant)
    return tuning.tuned(variant, plan.query.dtype, sizes, devices.names(plan.options.backend, plan.query.device))


def _fill_batch(args: np.ndarray, batch: Shape, specs: Mapping[str, ArraySpec], order: Iterable[int]) -> None:
    """Batch shape and strides, with the batch dimensions in ``order`` and merged where all strides allow."""
    order = list(order)
    strides = [batch_strides(spec, batch) for spec in specs.values()]
    shape, strides = collapse(tuple(batch[dim] for dim in order), [tuple(s[dim] for dim in order) for s in strides])
    if len(shape) > MAX_BATCH_DIMS:
        raise ValueError(
            f"query, key and the gradient must have batch dimensions that merge, by all their strides, into at most "
            f"{MAX_BATCH_DIMS}, got batch {batch}; reshape it to fewer dimensions, or expand and copy what is broadcast"
        )
    missing = MAX_BATCH_DIMS - len(shape)
    args["batch_shape"] = (1,) * missing + shape
    for (name, spec), stride in zip(specs.items(), strides, strict=True):
        args[name] = (0, (0,) * missing + stride, spec.strides[-2])


def _fill_options(args: np.ndarray, plan: Plan) -> None:
    args["score"] = SCORES[plan.options.score]
    args["scale"], args["eps"] = _number(plan.options.scale), _number(plan.options.eps)


def _number(value: float) -> tuple[float, np.float32, int]:
    """A struct Number; in float32 it may be 0 or infinite, as it would be in the kernel."""
    with np.errstate(over="ignore", under="ignore"):
        return value, np.float32(value), 0


def _tiles(length: int, variant: Variant, block: str) -> int:
    return -(-length // variant.parameters[block])


def _launch(
    variant: Variant, plan: Plan | AttentionPlan, args: np.ndarray, blocks: int, places: Iterable[tuple[str, int]]
) -> Launch:
    if blocks > _MAX_BLOCKS:
        raise ValueError(
            f"query and key must need at most {_MAX_BLOCKS} blocks of {variant.path.name}, got {blocks} for query "
            f"{plan.query.shape} and key {plan.key.shape}; split the batch"
        )
    defines = (("DTYPE", DTYPE_CODES[plan.query.dtype]), *variant.parameters.items())
    return Launch(variant, registry.source(variant), defines, blocks, args.tobytes(), tuple(places))
