"""8-bit query and key for L1: one scale for both, and no zero point, as L1 does not see what both are moved by."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

from . import arrays, plan_quantized

#: Steps of an 8-bit number, from its least value to its largest.
STEPS = 255

#: Of a scale, so that a step is not lost where GPUs flush what is smaller.
SMALLEST = float(np.finfo(np.float32).tiny)


def quantize_for_l1(query: Any, key: Any, *, dtype: str = "int8", enable_gqa: bool = False) -> tuple[Any, Any, Any]:
    """Query and key rounded to 8 bits, with one scale for each matrix of queries and its keys.

    In each channel the least number of both becomes the least number of ``dtype``, and the width of the widest channel
    becomes 255 steps::

        quant_scale = max_k ( max_ij {query[i, k], key[j, k]} - min_ij {query[i, k], key[j, k]} ) / 255
        sum_k |query[i, k] - key[j, k]|  =  quant_scale * sum_k |query8[i, k] - key8[j, k]|   but for rounding

    Parameters
    ----------
    query : array, shape (..., L, E)
        float16, bfloat16, float32 or float64; a NumPy or CuPy array, a torch tensor, or an array of another library
        that speaks DLPack.
    key : array, shape (..., S, E)
        Of the library, dtype and device of ``query``; leading dimensions broadcast.
    dtype : str
        "int8" or "uint8".
    enable_gqa : bool
        As in `l1_attention`: heads of query may be a multiple of those of key; those that share a key share a scale.

    Returns
    -------
    query8, key8 : array
        In ``dtype`` and the shapes of ``query`` and ``key``.
    quant_scale : array, shape (..., 1, 1)
        float32, positive: what to give to `l1_scores` and `l1_attention` beside the two. Its leading dimensions are
        those of ``query`` and ``key``, 1 where either has 1, as one matrix then meets all of the other; with
        ``enable_gqa`` its heads are those of ``key``. NaN, and so are all scores, where a matrix has a number that is
        NaN or infinite, or a width beyond float32.

    Raises
    ------
    TypeError, ValueError
        As `l1_scores`; also when ``dtype`` is another, or where a gradient would be needed, which rounding has not.

    Notes
    -----
    A number is off by at most half a step, ``quant_scale / 2``. A few numbers far out widen the step for all others.
    Both arrays must be quantised together, and again when either changes.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.array([[0.0, 14.0]]), np.array([[510.0, 20.0], [4.0, 14.0]])
    >>> query8, key8, quant_scale = quantize_for_l1(query, key, dtype="uint8")
    >>> key8
    array([[255,   3],
           [  2,   0]], dtype=uint8)
    >>> quant_scale
    array([[2.]], dtype=float32)
    >>> import l1attn_cupy as l1
    >>> l1.l1_scores(query8, key8, quant_scale=quant_scale, score="distance")
    array([[516.,   4.]], dtype=float32)
    """
    plan_quantized.quantize_types(dtype, enable_gqa)
    q, k = arrays.accept("query", query), arrays.accept("key", key)
    if _is_traced(q) and arrays.is_torch(k):
        plan_quantized.quantize.__wrapped__(*map(arrays.describe_traced, (q, k)), dtype, enable_gqa)
    else:
        plan_quantized.quantize(arrays.describe(q), arrays.describe(k), dtype, enable_gqa)
    if arrays.is_torch(q):
        from . import operators_quantized

        operators_quantized.check_no_gradient({"query": q, "key": k})
    numbers = arrays.converted(q, _precision(q)), arrays.converted(k, _precision(k))
    numbers = tuple(x.reshape(shape) for x, shape in zip(numbers, _aligned(q.shape, k.shape, enable_gqa), strict=True))
    with _quietly(q):
        lowest, scale = _range(*numbers)
        q8, k8 = (_rounded(x, lowest, scale, dtype) for x in numbers)
    heads = (*scale.shape[:-3], 1, 1) if enable_gqa else scale.shape
    results = q8.reshape(q.shape), k8.reshape(k.shape), arrays.converted(scale, "float32").reshape(heads)
    return tuple(arrays.give_back(x, like) for x, like in zip(results, (query, key, query), strict=True))


def _is_traced(array: Any) -> bool:
    return arrays.is_torch(array) and sys.modules["torch"].compiler.is_compiling()


def _quietly(array: Any) -> contextlib.AbstractContextManager:
    """Without NumPy's warnings of NaN and infinity."""
    if arrays.is_torch(array):
        return contextlib.nullcontext()
    return np.errstate(invalid="ignore", over="ignore")


def _aligned(query: tuple[int, ...], key: tuple[int, ...], enable_gqa: bool) -> list[tuple[int, ...]]:
    """Shapes of as many dimensions; with shared heads, those of key times those of query that share one."""
    shapes = [tuple(query), tuple(key)]
    if enable_gqa:
        heads = key[-3]
        shapes = [(*s[:-3], heads, s[-3] // heads if heads else 1, *s[-2:]) for s in shapes]
    most = max(map(len, shapes))
    return [(1,) * (most - len(shape)) + shape for shape in shapes]


def _range(query: Any, key: Any) -> tuple[Any, Any]:
    """The least number of each channel, (..., 1, E), and the scale, (..., 1, 1); of nothing, 0 and the least scale."""
    pairs = list(zip(query.shape[:-2], key.shape[:-2], strict=True))
    common = tuple(a if a == b else 1 for a, b in pairs)
    joined = tuple(dim for dim, (a, b) in enumerate(pairs) if a != b)
    ends = [_ends(x, (*joined, -2)) for x in (query, key) if 0 not in x.shape]
    library = _library(query)
    if not ends:
        nothing = arrays.zeros((*common, 1, query.shape[-1]), query)
        return nothing, arrays.zeros((*common, 1, 1), query) + SMALLEST
    (lowest, highest), *others = ends
    for low, high in others:
        lowest, highest = library.minimum(lowest, low), library.maximum(highest, high)
    scale = library.amax((highest - lowest) / STEPS, axis=-1, keepdims=True)
    scale = library.clip(scale, SMALLEST, None)
    scale = arrays.converted(scale, "float32")
    scale = arrays.converted(scale + 0 * scale, _precision(query))  # infinity becomes NaN
    return lowest, scale


def _ends(numbers: Any, dims: tuple[int, ...]) -> tuple[Any, Any]:
    library = _library(numbers)
    return library.amin(numbers, axis=dims, keepdims=True), library.amax(numbers, axis=dims, keepdims=True)


def _rounded(numbers: Any, lowest: Any, scale: Any, dtype: str) -> Any:
    steps = numbers - lowest  # the one array of this size that is made
    steps /= scale
    if arrays.is_torch(steps):
        steps.round_().clamp_min_(0).clamp_max_(STEPS)
    else:
        library = _library(steps)
        library.rint(steps, out=steps)
        library.clip(steps, 0, STEPS, out=steps)
    if dtype == "int8":
        steps -= 128
    return arrays.converted(steps, dtype)


def _precision(array: Any) -> str:
    return "float64" if str(array.dtype).endswith("float64") else "float32"


def _library(array: Any) -> Any:
    """NumPy, CuPy or torch, whose functions used here have the same names and arguments."""
    return sys.modules["torch"] if arrays.is_torch(array) else sys.modules["cupy"] if arrays.is_cupy(array) else np
