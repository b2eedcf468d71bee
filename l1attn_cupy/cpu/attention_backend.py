"""Fused attention on the CPU: from a plan and arrays to calls of compiled kernels, as `backend` does for the scores.

How rows are cut into blocks and keys into parts depends on sizes alone, never on the number of threads, so that the
result does not either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..functions import SCORES
from ..plan import ITEMSIZE, ArraySpec, Shape, broadcast_dims, contiguous
from ..plan_attention import SAVED, UNLIMITED, AttentionPlan, Saved, Segments
from ..plan_quantized import Quantized
from . import attention, attention_gradients, threads
from .attention import ADDITIVE, BOOLEAN, NO_MASK, Y_ROWS
from .backend import _Call, _ceil_to, _lay_out, _Layout, _panel, _split
from .elements import DTYPE_CODES
from .vector import lanes

#: Tasks to make at least, if there is work for so many: enough to share it evenly among many threads.
_TASKS = 64

#: Runs for each thread; tasks of falling cost are shared out among them.
_RUNS_PER_THREAD = 4

#: Most rows of x in a task, and fewest keys in a part of them.
_MOST_ROWS = 128
_FEWEST_KEYS = 512

#: Most parts that dquery is summed in, and most memory for them.
_MOST_PARTS = 8
_PARTS_BYTES = 64 << 20

_NO_LIMIT = 1 << 40


class _Step(NamedTuple):
    """A call, the names of its arrays ("" is none), and whether it takes the parts of dquery as scratch memory."""

    names: tuple[str, ...]
    call: _Call
    in_parts: bool = False


class _Side(NamedTuple):
    """What a task owns, x: the queries, or the keys with the roles of query and key exchanged."""

    segments: Segments
    low: int
    high: int

    @property
    def longest(self) -> int:
        return int((self.segments[:, 1] - self.segments[:, 0]).max(initial=0))


def _cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a function of a plan and more returns, unless the plan has segments, which are new in every call."""
    kept = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def call(plan: AttentionPlan, *more: Any) -> Any:
        return (kept if plan.segments is None else function)(plan, *more)

    return call


def attention_forward(
    plan: AttentionPlan, query: Any, key: Any, value: Any, mask: Any | None, out: Any, softmax: Any
) -> None:
    """Write ``out``, in its dtype, and ``softmax``; neither L nor a batch dimension is 0."""
    _attention_forward(plan, None, (query, key, value, mask, None), out, softmax)


def attention_quantized(
    plan: AttentionPlan,
    quantized: Quantized,
    given: tuple[Any, Any, Any, Any | None, Any | None],
    out: Any,
    softmax: Any,
) -> None:
    """The same from 8-bit query and key: ``given`` is query, key, value, mask and quant_scale."""
    _attention_forward(plan, quantized, given, out, softmax)


def _attention_forward(plan: AttentionPlan, quantized: Quantized | None, given: tuple, out: Any, softmax: Any) -> None:
    workers = threads.count(given[2], terms=_terms(plan))
    given = tuple(0 if array is None else arrays.address(array) for array in given)
    results = arrays.address(out), arrays.address(softmax)
    forward, merge, parts = _forward_calls(plan, arrays.describe(out).dtype, workers, quantized)
    if merge is None:
        forward.launch(*given, *results)
        return
    part_out = np.empty((parts, math.prod(plan.batch), plan.length_q, plan.channels_v), plan.lse_dtype)
    part_softmax = np.empty((*part_out.shape[:-1], 2), plan.lse_dtype)
    forward.launch(*given, arrays.address(part_out), arrays.address(part_softmax))
    merge.launch(*results, scratch=(part_out, part_softmax))


def attention_backward(plan: AttentionPlan, saved: Saved, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Write ``wanted``, of dquery, dkey, dvalue and dmask. No dimension of the scores is 0.

    ``given`` has query, key, value, mask, grad_out, out, softmax and grad_lse; mask and grad_lse may be None. ``saved``
    describes the last four.
    """
    workers = threads.count(given["query"], terms=_terms(plan))
    delta = arrays.empty(plan.lse_shape, given["query"], plan.lse_dtype)
    addresses = {name: 0 if array is None else arrays.address(array) for name, array in given.items()}
    addresses |= {name: arrays.address(array) for name, array in wanted.items()}
    addresses["delta"] = arrays.address(delta)
    names = tuple(wanted)
    size, calls = _gradient_calls(plan, saved, names, workers, _summed_in(plan, names))
    parts = (np.zeros(size, plan.lse_dtype),)
    for of_call, call, in_parts in calls:
        call.launch(*[addresses.get(name, 0) for name in of_call], scratch=parts if in_parts else ())


@_cached
def _summed_in(plan: AttentionPlan, wanted: tuple[str, ...]) -> int:
    """In how many parts dquery is summed along with dkey and dvalue, in one pass for all; 0 if each has its own pass.

    One pass is faster, but it needs memory for the parts and has no more tasks than parts of batch entries. Where one
    thread does all, a part for each is enough.
    """
    batches = math.prod(plan.batch)
    whole = not any(any(broadcast_dims(x, plan.batch)) for x in (plan.query, plan.key, plan.value))
    number = 1 if _terms(plan) < threads.SERIAL_TERMS else -(-_TASKS // batches)
    size = number * batches * plan.length_q * plan.channels * ITEMSIZE[plan.lse_dtype]
    few = number <= min(_MOST_PARTS, -(-plan.length_k // _MOST_ROWS)) and size <= _PARTS_BYTES
    return number if whole and few and not plan.packed and {"dquery", "dkey"} <= set(wanted) else 0


def _terms(plan: AttentionPlan) -> int:
    if plan.segments is None:
        pairs = plan.length_q * plan.length_k
    else:
        pairs = int(((plan.segments[:, 1] - plan.segments[:, 0]) * (plan.segments[:, 3] - plan.segments[:, 2])).sum())
    return math.prod(plan.batch) * pairs * max(plan.channels + plan.channels_v, 1)


@_cached
def _forward_calls(
    plan: AttentionPlan, out_dtype: str, workers: int, quantized: Quantized | None
) -> tuple[_Call, _Call | None, int]:
    """The call that writes out and softmax; or, of each part of the keys, and the one that joins the parts."""
    rows = (*plan.batch, plan.length_q)
    out = plan.new_like(plan.query._replace(shape=(*rows, plan.channels_v), dtype=out_dtype))
    softmax = contiguous(plan.query._replace(dtype=plan.lse_dtype), (*rows, 2))
    parts = _parts(plan)
    if parts == 1:
        return _forward_call(plan, out, softmax, workers, 1, quantized), None, 1
    part_out, part_softmax = (contiguous(spec, spec.shape)._replace(dtype=plan.lse_dtype) for spec in (out, softmax))
    forward = _forward_call(plan, part_out, part_softmax, workers, parts, quantized)
    return forward, _merge_call(plan, out, softmax), parts


def _forward_call(
    plan: AttentionPlan, out: ArraySpec, softmax: ArraySpec, workers: int, parts: int, quantized: Quantized | None
) -> _Call:
    """The call that writes out and softmax, or those of each part of the keys, which lie one after another."""
    quant_scale = quantized and quantized.quant_scale
    specs = [plan.query, plan.key, plan.value, plan.mask or softmax, quant_scale or softmax, out, softmax]
    batch, layout = _lay_out(specs, plan.batch, range(len(plan.batch)))
    batches, itemsize = math.prod(plan.batch), ITEMSIZE[plan.query.dtype]
    side = _queries(plan)
    block = _block(plan, side.longest, batches)
    work = _work(side, block, parts)
    dtypes = (
        *(DTYPE_CODES[plan.query.dtype], itemsize),
        *(DTYPE_CODES[out.dtype], ITEMSIZE[out.dtype]),
        *(ITEMSIZE[plan.lse_dtype], _mask_kind(plan)),
        *((int(quantized.dtype == "int8"), 1) if quantized else (DTYPE_CODES[plan.query.dtype], itemsize)),
    )
    strides = (batches * plan.length_q * plan.channels_v, batches * plan.length_q * 2) if parts > 1 else (0, 0)
    blocks = (block, *strides, _runs(len(work) * batches, workers))
    arguments = (dtypes, batch, (batches, plan.channels, plan.channels_v), work, blocks, (side.low, side.high))
    kernel = attention.forward if workers > 1 else attention.forward_serial
    like = np.empty(0, np.uint64 if quantized else plan.lse_dtype)
    return _kept(plan, _Call(kernel, workers, layout, (*arguments, *_score(plan), like)))


def _merge_call(plan: AttentionPlan, out: ArraySpec, softmax: ArraySpec) -> _Call:
    batch, layout = _lay_out([out, softmax], plan.batch, range(len(plan.batch)))
    dtypes = (DTYPE_CODES[out.dtype], ITEMSIZE[out.dtype], ITEMSIZE[plan.lse_dtype])
    return _kept(plan, _Call(attention.merge, 1, layout, (dtypes, batch)), scratch=2)


@_cached
def _gradient_calls(
    plan: AttentionPlan, saved: Saved, wanted: tuple[str, ...], workers: int, parts: int
) -> tuple[Shape, list[_Step]]:
    """The size of the memory for the parts of dquery, and the calls of a backward pass in their order.

    ``saved`` describes the arrays of that name.
    """
    known = _known(plan, saved, wanted)
    steps = [_delta_call(plan, known, workers)]
    if "dquery" in known and not parts:
        steps.append(_rows_call(plan, known, workers, "dquery", ""))
    together = broadcast_dims(plan.key, plan.batch) == broadcast_dims(plan.value, plan.batch)
    if together and ("dkey" in known or "dvalue" in known):
        steps.append(_rows_call(plan, known, workers, "dkey", "dvalue", parts))
    elif "dkey" in known:
        steps.append(_rows_call(plan, known, workers, "dkey", ""))
    if not together and "dvalue" in known:
        steps.append(_rows_call(plan, known, workers, "", "dvalue"))
    if parts:
        steps.append(_join_call(plan, known, workers))
    if "dmask" in known:
        steps.append(_mask_call(plan, known, workers))
    padded = _ceil_to(plan.channels, lanes(ITEMSIZE[plan.lse_dtype]))
    return (parts, math.prod(plan.batch), plan.length_q, padded) if parts else (0, 0, 0, 0), steps


def _known(plan: AttentionPlan, saved: Saved, wanted: tuple[str, ...]) -> dict[str, ArraySpec]:
    """The arrays of a backward pass as kernels see them."""
    given = {"query": plan.query, "key": plan.key, "value": plan.value, "mask": plan.mask}
    known = {name: spec for name, spec in given.items() if spec is not None}
    gradients = {name: plan.new_like(known[name.removeprefix("d")]) for name in wanted}
    delta = contiguous(plan.query._replace(dtype=plan.lse_dtype), (*plan.batch, plan.length_q, 1))
    seen = {n: plan.seen_by_kernels(n, spec) for n, spec in zip(SAVED, saved, strict=True) if spec is not None}
    return {**known, **gradients, **seen, "delta": delta}


def _delta_call(plan: AttentionPlan, specs: Mapping[str, ArraySpec], workers: int) -> _Step:
    names = ("grad_out", "out", "grad_lse", "delta")
    batch, layout = _matrices(plan, specs, names, range(len(plan.batch)))
    like = np.zeros(1, plan.lse_dtype)
    grad, out, grad_lse = (specs.get(name, plan.query).dtype for name in ("grad_out", "out", "grad_lse"))
    dtypes = (
        *(DTYPE_CODES[grad], ITEMSIZE[grad], DTYPE_CODES[out], ITEMSIZE[out]),
        *(ITEMSIZE[plan.lse_dtype], ITEMSIZE[grad_lse]),
    )
    sizes = (math.prod(plan.batch), plan.length_q, plan.channels_v)
    runs = _runs(math.prod(plan.batch) * plan.length_q, workers)
    kernel = attention_gradients.delta if workers > 1 else attention_gradients.delta_serial
    return _Step(names, _kept(plan, _Call(kernel, workers, layout, (dtypes, batch, sizes, runs, like))))


def _rows_call(
    plan: AttentionPlan, specs: Mapping[str, ArraySpec], workers: int, dx: str, dxv: str, parts: int = 0
) -> _Step:
    """The call for dquery, or for dkey and dvalue or one of them; with ``parts`` also for those of dquery."""
    of_key = dx != "dquery"
    x, y = (("key", "value"), ("query", "grad_out")) if of_key else (("query", "grad_out"), ("key", "value"))
    names = (*x, *y, "softmax", "delta", "mask", dx, dxv)
    owner = plan.value if not dx else plan.key if of_key else plan.query
    order, kept, summed = _owned(plan, owner)
    batch, layout = _matrices(plan, specs, names, order, transposed=(6,) if of_key else ())
    side = _keys(plan) if of_key else _queries(plan)
    block = _block(plan, side.longest, kept)
    work = _work(side, block, parts=1)
    sizes = (kept, summed, plan.channels, plan.channels_v)
    blocks = (block, of_key, _runs((parts or len(work)) * kept, workers))
    kernel = attention_gradients.backward if workers > 1 else attention_gradients.backward_serial
    arguments = (_gradient_dtypes(plan), batch, sizes, work, blocks, (side.low, side.high), *_score(plan))
    return _Step(names, _kept(plan, _Call(kernel, workers, layout, arguments), scratch=1), in_parts=True)


def _join_call(plan: AttentionPlan, specs: Mapping[str, ArraySpec], workers: int) -> _Step:
    batch, layout = _matrices(plan, specs, ("dquery",), range(len(plan.batch)))
    dtypes = DTYPE_CODES[plan.query.dtype], ITEMSIZE[plan.query.dtype]
    runs = _runs(math.prod(plan.batch) * plan.length_q, workers)
    kernel = attention_gradients.join if workers > 1 else attention_gradients.join_serial
    arguments = (dtypes, batch, plan.channels, runs)
    return _Step(("dquery",), _kept(plan, _Call(kernel, workers, layout, arguments), scratch=1), in_parts=True)


def _mask_call(plan: AttentionPlan, specs: Mapping[str, ArraySpec], workers: int) -> _Step:
    names = ("query", "key", "value", "grad_out", "softmax", "delta", "mask", "dmask")
    order, kept, summed = _owned(plan, specs["dmask"])
    batch, layout = _matrices(plan, specs, names, order)
    sizes = (kept, summed, plan.length_q, plan.length_k, plan.channels, plan.channels_v)
    rows, columns = specs["dmask"].shape[-2:]
    shared = (rows < plan.length_q, columns < plan.length_k)
    runs = _runs(kept * plan.length_q * plan.length_k, workers)
    side = _queries(plan)
    kernel = attention_gradients.mask_gradient if workers > 1 else attention_gradients.mask_gradient_serial
    arguments = (_gradient_dtypes(plan), batch, sizes, shared, runs, (side.low, side.high), *_score(plan))
    return _Step(names, _kept(plan, _Call(kernel, workers, layout, arguments)))


def _kept(plan: AttentionPlan, call: _Call, scratch: int = 0) -> _Call:
    """The call, which takes ``scratch`` arrays in 4 dimensions, with its machine code at hand if the cache keeps it.

    A call with segments is not kept: Numba itself finds the code sooner.
    """
    return call if plan.segments is not None else call.compiled(*[np.empty((0,) * 4, plan.lse_dtype)] * scratch)


def _matrices(
    plan: AttentionPlan,
    specs: Mapping[str, ArraySpec],
    names: tuple[str, ...],
    order: Sequence[int],
    transposed: tuple[int, ...] = (),
) -> tuple[np.ndarray, _Layout]:
    """`_lay_out` of arrays by name; one that is not there, whose address is 0, is laid out like query."""
    return _lay_out([specs.get(name, plan.query) for name in names], plan.batch, order, transposed)


def _owned(plan: AttentionPlan, spec: ArraySpec) -> tuple[list[int], int, int]:
    """Of a gradient like ``spec``: batch dimensions, those to sum over last; batches, and how many go into each."""
    shared = broadcast_dims(spec, plan.batch)
    order = sorted(range(len(shared)), key=lambda dim: shared[dim])
    summed = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    return order, math.prod(plan.batch) // summed, summed


def _gradient_dtypes(plan: AttentionPlan) -> tuple[int, int, int, int]:
    dtype = plan.query.dtype
    return DTYPE_CODES[dtype], ITEMSIZE[dtype], ITEMSIZE[plan.lse_dtype], _mask_kind(plan)


def _score(plan: AttentionPlan) -> tuple[int, np.ndarray]:
    return SCORES[plan.options.score], np.array([plan.options.scale, plan.options.eps], plan.lse_dtype)


def _mask_kind(plan: AttentionPlan) -> int:
    if plan.mask is None:
        return NO_MASK
    return BOOLEAN if plan.mask.dtype == "bool" else ADDITIVE


def _runs(tasks: int, workers: int) -> int:
    return 1 if workers == 1 else min(tasks, workers * _RUNS_PER_THREAD)


def _queries(plan: AttentionPlan) -> _Side:
    left, right = (_NO_LIMIT if n == UNLIMITED else n for n in plan.window)
    return _Side(plan.sequences, -right, left)


def _keys(plan: AttentionPlan) -> _Side:
    left, right = (_NO_LIMIT if n == UNLIMITED else n for n in plan.window)
    return _Side(plan.sequences[:, [2, 3, 0, 1]], -left, right)


def _block(plan: AttentionPlan, length: int, batches: int) -> int:
    """Rows of x in a task: many, so that a tile of y is loaded for many, but work for every thread."""
    width, fitting = _panel(plan.lse_dtype, max(plan.channels, plan.channels_v))
    return _split(length, width, min(fitting, _MOST_ROWS), -(-_TASKS // batches))


def _parts(plan: AttentionPlan) -> int:
    """Into how many parts keys are split, so that a few queries against many keys are work for all threads."""
    side, batches = _queries(plan), math.prod(plan.batch)
    work = _work(side, _block(plan, side.longest, batches), parts=1)
    tasks = len(work) * batches
    longest = int((work[:, 3] - work[:, 2]).max())
    return max(1, min(-(-_TASKS // tasks), longest // _FEWEST_KEYS))


def _work(side: _Side, block: int, parts: int) -> np.ndarray:
    """The tasks of one batch entry, those that take longest first; see `attention._forward` for the columns."""
    blocks = -((side.segments[:, 0] - side.segments[:, 1]) // block)
    x, end_x, y, end_y = np.repeat(side.segments, blocks, axis=0).T
    number = np.arange(len(x)) - np.repeat(np.cumsum(blocks) - blocks, blocks)  # of a block in its sequence
    start = x + number * block
    rows = np.minimum(block, end_x - start)
    first = np.maximum(0, start - x - side.high) // Y_ROWS * Y_ROWS
    last = np.maximum(first, np.minimum(end_y - y, start - x + rows - side.low))
    step = -((first - last) // (parts * Y_ROWS)) * Y_ROWS
    part = np.arange(parts)[:, np.newaxis]
    begin, stop = (y + np.minimum(last, first + n * step) for n in (part, part + 1))
    table = np.stack(np.broadcast_arrays(start, rows, begin, stop, y - x, part), -1).reshape(-1, 6)
    return table[np.argsort(-table[:, 1] * (table[:, 3] - table[:, 2]), kind="stable")]
