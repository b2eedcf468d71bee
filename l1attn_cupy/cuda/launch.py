"""What a launch consists of: the bytes of the argument struct, and the grid. The same for CUDA and the emulator.

The structs are those of ``kernels_cu/common.cuh``; `numpy.dtype` with ``align=True`` lays them out as C++ does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..functions import SCORES
from ..plan import ArraySpec, Plan, Shape, batch_strides, broadcast_dims, collapse
from .registry import Variant, choose

MAX_BATCH_DIMS = 6
_MAX_BLOCKS = 2**31 - 1

_MATRIX = np.dtype([("data", "u8"), ("batch_stride", "i8", MAX_BATCH_DIMS), ("row_stride", "i8")], align=True)
_SCORES_FORWARD = np.dtype(
    [
        *((name, _MATRIX) for name in ("q", "k", "out")),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("length_q", "length_k", "channels", "score")),
        *((name, "f8") for name in ("scale", "eps")),
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
        *((name, "f8") for name in ("scale", "eps")),
    ],
    align=True,
)

#: Value of the macro DTYPE.
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}


@dataclass(frozen=True)
class Operand:
    """An array as a kernel gets it: address of its first element, and its shape and strides."""

    address: int
    spec: ArraySpec


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    variant: Variant
    defines: Mapping[str, int]
    grid: int
    arguments: bytes

    @property
    def threads(self) -> int:
        return self.variant.parameters["THREADS"]


def pick(op: str, plan: Plan) -> Variant:
    """The variant for a call."""
    sizes = {"q": plan.length_q, "k": plan.length_k, "e": plan.channels}
    return choose(op, plan.query.dtype, sizes, plan.options.variant)


def scores_forward(plan: Plan, variant: Variant, query: Operand, key: Operand, out: Operand) -> Launch:
    """The launch that computes ``out``; no dimension of it is 0."""
    args = np.zeros((), _SCORES_FORWARD)
    _fill_batch(args, plan.batch, {"q": query, "k": key, "out": out}, range(len(plan.batch)))
    args["length_q"], args["length_k"], args["channels"] = plan.length_q, plan.length_k, plan.channels
    _fill_options(args, plan)
    blocks = _tiles(plan.length_q, variant, "BLOCK_Q") * _tiles(plan.length_k, variant, "BLOCK_K")
    return _launch(variant, plan, args, math.prod(plan.batch) * blocks)


def scores_backward(
    plan: Plan,
    variant: Variant,
    operands: Mapping[str, Operand],
    dquery: Operand | None,
    dkey: Operand | None,
) -> Launch | None:
    """The launch that computes the gradients that are wanted and not empty; None if there is none.

    ``operands`` has the keys query, key, grad and scores.
    """
    args = np.zeros((), _SCORES_BACKWARD)
    args["channels"] = plan.channels
    _fill_options(args, plan)
    sides = (("dq", "query", "key", dquery), ("dk", "key", "query", dkey))
    blocks = [_fill_gradient(args[field], plan, variant, operands, x, y, dx) for field, x, y, dx in sides]
    if not any(blocks):
        return None
    return _launch(variant, plan, args, max(blocks) if variant.atomic else sum(blocks))


def _fill_gradient(
    args: np.ndarray, plan: Plan, variant: Variant, operands: Mapping[str, Operand], x: str, y: str, dx: Operand | None
) -> int:
    """Arguments for one gradient; returns how many blocks it takes. Atomic kernels need the lengths in any case."""
    x_spec = operands[x].spec
    wanted = dx is not None and 0 not in x_spec.shape
    args["batch_shape"] = 1
    if not wanted and not variant.atomic:
        return 0
    shared = broadcast_dims(x_spec, plan.batch) if not variant.atomic else (False,) * len(plan.batch)
    order = sorted(range(len(shared)), key=lambda dim: shared[dim])  # dimensions to sum over come last
    target = dx if dx is not None else Operand(0, x_spec)
    matrices = {"x": operands[x], "y": operands[y], "grad": operands["grad"], "scores": operands["scores"], "dx": target}
    _fill_batch(args, plan.batch, matrices, order)
    args["kept"] = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if not sum_over)
    args["summed"] = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    args["length_x"], args["length_y"] = x_spec.shape[-2], operands[y].spec.shape[-2]
    args["x_is_row"] = x == "query"
    if not wanted:
        return 0
    if variant.atomic:
        tiles = _tiles(plan.length_q, variant, "BLOCK_Q") * _tiles(plan.length_k, variant, "BLOCK_K")
    else:
        tiles = _tiles(x_spec.shape[-2], variant, "BLOCK_X")
    return int(args["kept"]) * tiles * _tiles(plan.channels, variant, "BLOCK_E")


def _fill_batch(args: np.ndarray, batch: Shape, operands: Mapping[str, Operand], order: range | list[int]) -> None:
    """Batch shape and the matrices' places, with the batch dimensions in ``order`` and merged where strides allow."""
    strides = [batch_strides(operand.spec, batch) for operand in operands.values()]
    shape, strides = collapse(tuple(batch[dim] for dim in order), [tuple(s[dim] for dim in order) for s in strides])
    if len(shape) > MAX_BATCH_DIMS:
        raise ValueError(
            f"query and key must have batch dimensions whose strides merge into at most {MAX_BATCH_DIMS}, got batch "
            f"{batch}; call contiguous() first"
        )
    missing = MAX_BATCH_DIMS - len(shape)
    args["batch_shape"] = (1,) * missing + shape
    for (name, operand), stride in zip(operands.items(), strides, strict=True):
        args[name] = (operand.address, (0,) * missing + stride, operand.spec.strides[-2])


def _fill_options(args: np.ndarray, plan: Plan) -> None:
    args["score"], args["scale"], args["eps"] = SCORES[plan.options.score], plan.options.scale, plan.options.eps


def _tiles(length: int, variant: Variant, block: str) -> int:
    return -(-length // variant.parameters[block])


def _launch(variant: Variant, plan: Plan, args: np.ndarray, blocks: int) -> Launch:
    if blocks > _MAX_BLOCKS:
        raise ValueError(
            f"query and key must need at most {_MAX_BLOCKS} blocks of {variant.path.name}, got {blocks} for query "
            f"{plan.query.shape} and key {plan.key.shape}; split the batch"
        )
    return Launch(variant, {"DTYPE": DTYPE_CODES[plan.query.dtype], **variant.parameters}, blocks, args.tobytes())
