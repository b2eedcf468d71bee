"""The CPU backend: from a plan and arrays to one call of a compiled kernel for each result."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..functions import SCORES
from ..plan import ITEMSIZE, ArraySpec, Plan, Shape, batch_strides, broadcast_dims, collapse, contiguous
from . import jit, quantized, threads
from .elements import DTYPE_CODES
from .scores import (
    Y_BLOCK,
    Matrix,
    backward,
    backward_both,
    backward_both_serial,
    backward_serial,
    forward,
    forward_serial,
)
from .tangents import jvp, jvp_serial
from .vector import panel_width

#: Numbers in one block of rows in scratch memory: 256 KiB in float32, a part of any L2 cache.
_BLOCK_NUMBERS = 1 << 16

#: Most memory for what a batch entry needs while both its gradients are made, of all threads together.
_GRADIENT_BYTES = 32 << 20

#: Keys in one tile of tangents of scores.
_TILE_KEYS = 64

#: Tasks for each thread, so that a slow core does not hold up the others.
_TASKS_PER_THREAD = 4


def scores_forward(plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``, which is contiguous and not empty."""
    workers = threads.count(query, terms=math.prod(plan.out_shape) * max(plan.channels, 1))
    call = _forward_call(plan, workers)
    call.launch(*map(arrays.address, (query, key, out)))


def scores_quantized(plan: Plan, query: Any, key: Any, quant_scale: Any | None, out: Any) -> None:
    """Write the scores of 8-bit ``query`` and ``key`` to ``out``, which is contiguous and not empty."""
    workers = threads.count(query, terms=math.prod(plan.out_shape) * max(plan.channels, 1))
    call = _quantized_call(plan, workers)
    scale_at = 0 if quant_scale is None else arrays.address(quant_scale)
    call.launch(arrays.address(query), arrays.address(key), scale_at, arrays.address(out))


def scores_backward(plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any) -> None:
    """Write the gradients that are not None; ``saved`` is the forward result or None."""
    specs = arrays.describe(grad), None if saved is None else arrays.describe(saved)
    workers = threads.count(query, terms=math.prod(plan.out_shape) * plan.channels)
    given = [0 if x is None else arrays.address(x) for x in (query, key, grad, saved, dquery, dkey)]
    for call, order in _backward_calls(plan, *specs, workers, dquery is not None, dkey is not None):
        call.launch(*map(given.__getitem__, order))


def scores_jvp(
    plan: Plan, query: Any, key: Any, tangent_query: Any, tangent_key: Any, saved: Any | None, out: Any
) -> None:
    """Write the tangent of the scores to ``out``; ``saved`` is the forward result, or None where F' is constant."""
    workers = threads.count(query, terms=math.prod(plan.out_shape) * plan.channels)
    given = tangent_query, tangent_key, out if saved is None else saved
    call = _tangent_call(plan, *map(arrays.describe, given), workers)
    call.launch(*map(arrays.address, (query, key, *given, out)))


#: A Matrix from its four numbers, at half the cost of calling it.
_MATRIX = functools.partial(tuple.__new__, Matrix)


class _Layout(NamedTuple):
    """What there is to the Matrix of each array of a call, but for the address."""

    rows: Shape
    columns: Shape
    batches: Shape


class _Call(NamedTuple):
    """A kernel and its arguments: all but the addresses, and scratch memory, which comes last."""

    kernel: Callable[..., None]
    workers: int
    layout: _Layout
    arguments: tuple

    def compiled(self, *scratch: np.ndarray) -> _Call:
        """The same with the machine code of the kernel, for arrays like ``scratch``."""
        matrices = map(_MATRIX, zip(itertools.repeat(0), *self.layout))  # as many as there are rows
        return self._replace(kernel=jit.compiled(self.kernel, (*matrices, *self.arguments, *scratch)))

    def launch(self, *addresses: int, scratch: tuple[np.ndarray, ...] = ()) -> None:
        matrices = map(_MATRIX, zip(addresses, *self.layout, strict=True))
        threads.launch(self.kernel, self.workers, *matrices, *self.arguments, *scratch)


@functools.lru_cache(maxsize=1024)
def _forward_call(plan: Plan, workers: int) -> _Call:
    out = contiguous(plan.query, plan.out_shape)
    batch, layout = _lay_out([plan.query, plan.key, out], plan.batch, range(len(plan.batch)))
    sizes = (math.prod(plan.batch), plan.length_q, plan.length_k, plan.channels)
    arguments = _common(plan, batch, sizes, _forward_blocks(plan, sizes, workers))
    return _Call(forward if workers > 1 else forward_serial, workers, layout, arguments).compiled()


@functools.lru_cache(maxsize=1024)
def _quantized_call(plan: Plan, workers: int) -> _Call:
    out = contiguous(plan.query, plan.out_shape)
    batch, layout = _lay_out([plan.query, plan.key, plan.quant_scale or out, out], plan.batch, range(len(plan.batch)))
    sizes = (math.prod(plan.batch), plan.length_q, plan.length_k, plan.channels)
    common = batch, sizes, _quantized_blocks(sizes, workers), *_score(plan)
    kernel = quantized.forward if workers > 1 else quantized.forward_serial
    return _Call(kernel, workers, layout, (plan.query.dtype == "int8", *common)).compiled()


@functools.lru_cache(maxsize=1024)
def _tangent_call(
    plan: Plan, tangent_query: ArraySpec, tangent_key: ArraySpec, saved: ArraySpec, workers: int
) -> _Call:
    specs = [plan.query, plan.key, tangent_query, tangent_key, saved, contiguous(plan.query, plan.out_shape)]
    batch, layout = _lay_out(specs, plan.batch, range(len(plan.batch)))
    sizes = (math.prod(plan.batch), plan.length_q, plan.length_k, plan.channels)
    width, fitting = _panel(plan.query.dtype, plan.channels)
    wanted = 1 if workers == 1 else workers * _TASKS_PER_THREAD
    rows = _split(plan.length_q, width, min(fitting, 256), -(-wanted // sizes[0]))
    tasks = sizes[0] * -(-plan.length_q // rows)
    blocks = (rows, min(_TILE_KEYS, _ceil_to(plan.length_k, width)), min(tasks, wanted))
    return _Call(jvp if workers > 1 else jvp_serial, workers, layout, _common(plan, batch, sizes, blocks)).compiled()


def _gradient_call(plan: Plan, grad: ArraySpec, saved: ArraySpec | None, workers: int, of_key: bool) -> _Call:
    """The gradient of x, the array to differentiate by; for that of the key, grad and scores are transposed."""
    x, y = (plan.key, plan.query) if of_key else (plan.query, plan.key)
    shared = broadcast_dims(x, plan.batch)
    order = sorted(range(len(shared)), key=lambda dim: shared[dim])  # dimensions to sum over come last
    specs = [x, y, grad, saved or grad, contiguous(x, x.shape)]
    batch, layout = _lay_out(specs, plan.batch, order, transposed=(2, 3) if of_key else ())
    summed = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    kept = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if not sum_over)
    sizes = (kept, summed, x.shape[-2], y.shape[-2], plan.channels)
    x_is_row = layout.columns[2] <= layout.rows[2]  # read grad along its rows
    arguments = _common(plan, batch, sizes, _backward_blocks(plan, sizes, workers, x_is_row))
    return _Call(backward if workers > 1 else backward_serial, workers, layout, arguments).compiled()


@functools.lru_cache(maxsize=1024)
def _backward_calls(
    plan: Plan, grad: ArraySpec, saved: ArraySpec | None, workers: int, need_query: bool, need_key: bool
) -> list[tuple[_Call, Sequence[int]]]:
    """The calls for the gradients that are needed, each with its arrays: their places in query, key, grad, saved,
    dquery, dkey."""
    if need_query and need_key and _at_once(plan, workers):
        return [_both_call(plan, grad, saved, workers)]
    calls: list[tuple[_Call, Sequence[int]]] = []
    if need_query:
        calls.append((_gradient_call(plan, grad, saved, workers, of_key=False), (0, 1, 2, 3, 4)))
    if need_key:
        calls.append((_gradient_call(plan, grad, saved, workers, of_key=True), (1, 0, 2, 3, 5)))
    return calls


def _at_once(plan: Plan, workers: int) -> bool:
    """Whether both gradients are best made in one pass, whose tasks are batch entries.

    A term of it costs 4 instructions for both, one of two passes 3 for each.
    """
    batches = math.prod(plan.batch)
    shared = any(any(broadcast_dims(x, plan.batch)) for x in (plan.query, plan.key))
    itemsize = 8 if plan.query.dtype == "float64" else 4
    size = 2 * max(plan.length_q, plan.length_k) * plan.channels * itemsize * workers
    return not shared and size <= _GRADIENT_BYTES and 4 * -(-batches // workers) * workers <= 6 * batches


def _both_call(
    plan: Plan, grad: ArraySpec, saved: ArraySpec | None, workers: int
) -> tuple[_Call, tuple[int, int, int, int, int, int]]:
    """The call for both gradients, and its arrays. Along the rows of grad runs x, which is the query or the key."""
    swapped = grad.strides[-1] > grad.strides[-2]
    x, y = (plan.query, plan.key) if swapped else (plan.key, plan.query)
    specs = [x, y, grad, saved or grad, contiguous(x, x.shape), contiguous(y, y.shape)]
    batch, layout = _lay_out(specs, plan.batch, range(len(plan.batch)), transposed=(2, 3) if swapped else ())
    sizes = (math.prod(plan.batch), x.shape[-2], y.shape[-2], plan.channels)
    runs = min(sizes[0], 1 if workers == 1 else workers * _TASKS_PER_THREAD)
    arguments = _common(plan, batch, sizes, runs)
    call = _Call(backward_both if workers > 1 else backward_both_serial, workers, layout, arguments)
    return call.compiled(), (0, 1, 2, 3, 4, 5) if swapped else (1, 0, 2, 3, 5, 4)


def _lay_out(
    specs: Sequence[ArraySpec], batch: Shape, order: Sequence[int], transposed: Sequence[int] = ()
) -> tuple[np.ndarray, _Layout]:
    """The table of batch shape and strides, dimensions in ``order``, and the layout of all arrays."""
    expanded = [batch_strides(spec, batch) for spec in specs]
    shape, strides = collapse(tuple(batch[d] for d in order), [tuple(s[d] for d in order) for s in expanded])
    pairs = [spec.strides[-2:][:: -1 if i in transposed else 1] for i, spec in enumerate(specs)]
    rows, columns = zip(*pairs, strict=True)
    return np.array([shape, *strides], np.int64), _Layout(rows, columns, tuple(range(1, len(specs) + 1)))


def _common(plan: Plan, batch: np.ndarray, sizes: Shape, blocks: tuple | int) -> tuple:
    """The arguments that both kernels take after the matrices."""
    dtype = plan.query.dtype
    return DTYPE_CODES[dtype], ITEMSIZE[dtype], batch, sizes, blocks, *_score(plan)


def _score(plan: Plan) -> tuple[int, np.ndarray]:
    """Code of the score, and the scalars scale and eps in the type of accumulation."""
    options = plan.options
    scalars = np.array([options.scale, options.eps], np.float64 if plan.query.dtype == "float64" else np.float32)
    return SCORES[options.score], scalars


def _panel(dtype: str, channels: int) -> tuple[int, int]:
    """Rows in a panel, and most rows of so many channels that fit a block of scratch memory."""
    width = panel_width(8 if dtype == "float64" else 4)
    fitting = _BLOCK_NUMBERS // max(channels, 1) // width * width
    return width, max(fitting, width)


def _ceil_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _forward_blocks(plan: Plan, sizes: Shape, workers: int) -> tuple[int, int, int, int]:
    """Queries in a task, keys in a task, keys in a tile, and runs: large blocks, but work for every thread."""
    batches, length_q, length_k, _ = sizes
    width, fitting = _panel(plan.query.dtype, plan.channels)
    wanted = 1 if workers == 1 else workers * _TASKS_PER_THREAD
    rows = _split(length_q, width, fitting, -(-wanted // batches))
    row_tasks = batches * -(-length_q // rows)
    keys = _split(length_k, width, _ceil_to(length_k, width), -(-wanted // row_tasks))
    tasks = row_tasks * -(-length_k // keys)
    return rows, keys, min(keys, max(width, fitting // 2 // width * width)), min(tasks, wanted)


def _quantized_blocks(sizes: Shape, workers: int) -> tuple[int, int, int, int]:
    """The same for bytes: as many keys at once as fit a block of scratch memory, so that rows are written far along."""
    batches, length_q, length_k, channels = sizes
    wanted = 1 if workers == 1 else workers * _TASKS_PER_THREAD
    fitting = max(quantized.STRIP, _BLOCK_NUMBERS // max(channels, 1) // quantized.STRIP * quantized.STRIP)
    rows = _split(length_q, quantized.TILE_ROWS, min(fitting, 256), -(-wanted // batches))
    row_tasks = batches * -(-length_q // rows)
    keys = _split(length_k, quantized.STRIP, _ceil_to(length_k, quantized.STRIP), -(-wanted // row_tasks))
    tasks = row_tasks * -(-length_k // keys)
    return rows, keys, min(keys, fitting), min(tasks, wanted)


def _backward_blocks(plan: Plan, sizes: Shape, workers: int, x_is_row: bool) -> tuple[int, bool, int]:
    """Rows of x in a task, whether the rows of a tile of h are x, and runs."""
    kept, _, length_x, _, _ = sizes
    width, fitting = _panel(plan.query.dtype, plan.channels)
    wanted = 1 if workers == 1 else workers * _TASKS_PER_THREAD
    rows = _split(length_x, width, min(fitting, 2 * Y_BLOCK), -(-wanted // kept))
    return rows, x_is_row, min(kept * -(-length_x // rows), wanted)


def _split(length: int, multiple: int, most: int, parts: int) -> int:
    """Block size, a multiple of ``multiple`` up to ``most``, that cuts ``length`` into ``parts`` or more if it can."""
    return max(multiple, min(most, _ceil_to(-(-length // parts), multiple)))
