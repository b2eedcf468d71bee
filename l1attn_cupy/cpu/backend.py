"""The CPU backend: from a plan and arrays to one call of a compiled kernel for each result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..functions import SCORES
from ..plan import ITEMSIZE, ArraySpec, Plan, Shape, batch_strides, broadcast_dims, collapse
from . import threads
from .elements import DTYPE_CODES
from .scores import Y_BLOCK, Matrix, backward, backward_serial, forward, forward_serial
from .vector import panel_width, vector_step

#: Numbers in one block of rows in scratch memory: 256 KiB in float32, a part of any L2 cache.
_BLOCK_NUMBERS = 1 << 16

#: Keys in one tile of scores, whose rows are written at once.
_TILE_KEYS = 64

#: Tasks for each thread, so that a slow core does not hold up the others.
_TASKS_PER_THREAD = 4

#: Results from this size on bypass the caches: they would be evicted before anyone reads them.
_STREAM_BYTES = 1 << 22


def scores_forward(plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``."""
    place = _lay_out([plan.query, plan.key, arrays.describe(out)], [query, key, out], plan.batch)
    sizes = (math.prod(plan.batch), plan.length_q, plan.length_k, plan.channels)
    workers = threads.count(query, terms=math.prod(sizes))
    blocks = _forward_blocks(plan, sizes, workers)
    kernel = forward if workers > 1 else forward_serial
    stream = _streams(plan.query.dtype, place, math.prod(plan.out_shape))
    threads.launch(kernel, workers, *place.matrices, *_common(plan, place, sizes, blocks), stream)


def scores_backward(plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any) -> None:
    """Write the gradients that are not None; ``saved`` is the forward result or None."""
    if dquery is not None:
        _gradient(plan, plan.query, query, plan.key, key, grad, saved, dquery, transposed=False)
    if dkey is not None:
        _gradient(plan, plan.key, key, plan.query, query, grad, saved, dkey, transposed=True)


def _gradient(
    plan: Plan, x: ArraySpec, x_data: Any, y: ArraySpec, y_data: Any, grad: Any, saved: Any, dx: Any, transposed: bool
) -> None:
    """One gradient: x is the array to differentiate by; grad and scores are ``transposed`` where x is the key."""
    shared = broadcast_dims(x, plan.batch)
    order = sorted(range(len(shared)), key=lambda dim: shared[dim])  # dimensions to sum over come last
    specs = [x, y, arrays.describe(grad), arrays.describe(grad if saved is None else saved), arrays.describe(dx)]
    data = [x_data, y_data, grad, grad if saved is None else saved, dx]
    place = _lay_out(specs, data, plan.batch, order)
    for i in (2, 3):
        if transposed:
            place.matrices[i] = place.matrices[i]._replace(row=specs[i].strides[-1], column=specs[i].strides[-2])
    if saved is None:
        place.matrices[3] = place.matrices[3]._replace(data=0)
    summed = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    kept = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if not sum_over)
    sizes = (kept, summed, x.shape[-2], y.shape[-2], plan.channels)
    workers = threads.count(x_data, terms=math.prod(sizes))
    blocks = _backward_blocks(plan, sizes, workers, x_is_row=place.matrices[2].column <= place.matrices[2].row)
    kernel = backward if workers > 1 else backward_serial
    threads.launch(kernel, workers, *place.matrices, *_common(plan, place, sizes, blocks))


class _Place(NamedTuple):
    """Where arrays lie: table of batch shape and strides, one Matrix each, and what keeps the memory alive."""

    batch: np.ndarray
    matrices: list[Matrix]
    owners: list[np.ndarray]


def _lay_out(
    specs: Sequence[ArraySpec], data: Sequence[Any], batch: Shape, order: Sequence[int] | None = None
) -> _Place:
    order = range(len(batch)) if order is None else order
    expanded = [batch_strides(spec, batch) for spec in specs]
    shape, strides = collapse(tuple(batch[d] for d in order), [tuple(s[d] for d in order) for s in expanded])
    owners = [arrays.borrow(array) for array in data]
    matrices = [
        Matrix(owner.__array_interface__["data"][0], spec.strides[-2], spec.strides[-1], row)
        for row, (spec, owner) in enumerate(zip(specs, owners, strict=True), start=1)
    ]
    return _Place(np.array([shape, *strides], np.int64), matrices, owners)


def _common(plan: Plan, place: _Place, sizes: Shape, blocks: tuple) -> tuple:
    """The arguments that both kernels take after the matrices."""
    dtype, options = plan.query.dtype, plan.options
    scalars = np.array([options.scale, options.eps], np.float64 if dtype == "float64" else np.float32)
    return DTYPE_CODES[dtype], ITEMSIZE[dtype], place.batch, sizes, blocks, SCORES[options.score], scalars


def _panel(plan: Plan) -> tuple[int, int]:
    """Rows in a panel, and most rows of this plan's channels that fit a block of scratch memory."""
    width = panel_width(8 if plan.query.dtype == "float64" else 4)
    fitting = _BLOCK_NUMBERS // max(plan.channels, 1) // width * width
    return width, max(fitting, width)


def _ceil_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _forward_blocks(plan: Plan, sizes: Shape, workers: int) -> tuple[int, int, int, int]:
    """Queries in a task, keys in a task, keys in a tile, and runs: large blocks, but work for every thread."""
    batches, length_q, length_k, _ = sizes
    width, fitting = _panel(plan)
    wanted = 1 if workers == 1 else workers * _TASKS_PER_THREAD
    rows = _split(length_q, width, min(fitting, 256), -(-wanted // batches))
    row_tasks = batches * -(-length_q // rows)
    tile_keys = min(_TILE_KEYS, _ceil_to(length_k, width))
    keys = _split(length_k, tile_keys, _ceil_to(length_k, tile_keys), -(-wanted // row_tasks))
    tasks = row_tasks * -(-length_k // keys)
    return rows, keys, tile_keys, min(tasks, wanted)


def _backward_blocks(plan: Plan, sizes: Shape, workers: int, x_is_row: bool) -> tuple[int, bool, int]:
    """Rows of x in a task, whether the rows of a tile of h are x, and runs."""
    kept, _, length_x, _, _ = sizes
    width, fitting = _panel(plan)
    wanted = 1 if workers == 1 else workers * _TASKS_PER_THREAD
    rows = _split(length_x, width, min(fitting, 2 * Y_BLOCK), -(-wanted // kept))
    return rows, x_is_row, min(kept * -(-length_x // rows), wanted)


def _split(length: int, multiple: int, most: int, parts: int) -> int:
    """Block size, a multiple of ``multiple`` up to ``most``, that cuts ``length`` into ``parts`` or more if it can."""
    return max(multiple, min(most, _ceil_to(-(-length // parts), multiple)))


def _streams(dtype: str, place: _Place, count: int) -> bool:
    """Whether the results (the last matrix) may be written past the caches: large, and aligned to whole vectors."""
    itemsize, out = ITEMSIZE[dtype], place.matrices[-1]
    step = vector_step(itemsize)
    aligned = out.data % (step * itemsize) == 0 and out.column == 1
    whole = all(stride % step == 0 for stride in (out.row, *place.batch[out.batch].tolist()))
    return aligned and whole and count * itemsize >= _STREAM_BYTES
