"""Loading, storing and F for the CPU kernels: every dtype in, the accumulation type (float32 or float64) inside."""

from __future__ import annotations

import math

import numpy as np
from numba.extending import overload, register_jitable

from ..functions import INVERSE, LAPLACIAN, NEGATIVE
from .jit import kernel
from .vector import (
    CACHE_LINE,
    address_of,
    bits_as_float,
    float_as_bits,
    load_vector,
    peek,
    poke,
    store_vector,
    vector_step,
)

FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = range(4)
DTYPE_CODES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "float64": FLOAT64}

STEP4, STEP8 = vector_step(4), vector_step(8)


@kernel()
def aligned_empty(shape, like):
    """Scratch memory of the dtype of ``like`` that begins with a cache line: so no vector lies in two of them."""
    size = 1
    for n in shape:
        size *= n
    numbers = np.empty(size + CACHE_LINE // like.itemsize, like.dtype)
    first = -(address_of(numbers) // like.itemsize) % (CACHE_LINE // like.itemsize)
    return numbers[first : first + size].reshape(shape)


@register_jitable
def half_to_float(half):
    """float32 of the float16 bit pattern ``half`` (uint32); exact, subnormals and NaN included."""
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (half & np.uint32(0x7FFF)) << np.uint32(13)
    if magnitude >= np.uint32(0x0F800000):  # infinity and NaN keep the largest exponent
        return bits_as_float(sign | magnitude | np.uint32(0x7F800000))
    value = bits_as_float(magnitude) * np.float32(2.0**112)  # moves the exponent bias from 15 to 127
    return bits_as_float(sign | float_as_bits(value))


@register_jitable
def float_to_half(value):
    """float16 bit pattern (uint16) nearest to the float32 ``value``, ties to even."""
    bits = float_as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)  # NaN
    elif magnitude >= np.uint32(0x477FF000):
        half = np.uint32(0x7C00)  # 65520 and above round to infinity
    elif magnitude < np.uint32(0x38800000):  # subnormal: the float32 adder rounds at 2**-24
        half = float_as_bits(bits_as_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
    return np.uint16(sign | half)


@register_jitable
def float_to_bfloat(value):
    """bfloat16 bit pattern (uint16) nearest to the float32 ``value``, ties to even."""
    bits = float_as_bits(value)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))  # stays a (quiet) NaN
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@kernel()
def load_rows(source, dtype, row_stride, column_stride, rows, columns, target):
    """``target[r, c] = source[r * row_stride + c * column_stride]``, and zero in the rest of ``target``.

    ``source`` is an address, ``dtype`` the code of what lies there, strides count elements.
    """
    step = STEP4 if target.itemsize == 4 else STEP8
    for r in range(rows):
        base, first = r * row_stride, 0
        if column_stride == 1 and dtype == (FLOAT32 if target.itemsize == 4 else FLOAT64):
            first = columns - columns % step
            for c in range(0, first, step):
                load_vector(source, base + c, target, r, c, target.shape[0] * row_stride)
        if dtype == FLOAT32:
            for c in range(first, columns):
                target[r, c] = peek(source, base + c * column_stride, np.float32(0))
        elif dtype == FLOAT16:
            for c in range(columns):
                target[r, c] = half_to_float(np.uint32(peek(source, base + c * column_stride, np.uint16(0))))
        elif dtype == BFLOAT16:
            for c in range(columns):
                bits = np.uint32(peek(source, base + c * column_stride, np.uint16(0)))
                target[r, c] = bits_as_float(bits << np.uint32(16))
        else:
            for c in range(first, columns):
                target[r, c] = peek(source, base + c * column_stride, np.float64(0))
        for c in range(columns, target.shape[1]):
            target[r, c] = 0
    for r in range(rows, target.shape[0]):
        for c in range(target.shape[1]):
            target[r, c] = 0


@kernel()
def _copy_rows(source, rows, columns, target, row_stride, column_stride):
    step = STEP8 if source.itemsize == 8 else STEP4
    for r in range(rows):
        base, first = r * row_stride, 0
        if column_stride == 1:
            first = columns - columns % step
            for c in range(0, first, step):
                store_vector(source, r, c, target, base + c)
        for c in range(first, columns):
            poke(target, base + c * column_stride, source[r, c])


@kernel()
def store_rows(source, half, rows, columns, target, dtype, row_stride, column_stride):
    """``target[r * row_stride + c * column_stride] = source[r, c]``, rounded to nearest, ties to even.

    ``target`` is an address, ``half`` a uint16 array of the shape of ``source`` for 16-bit results.
    """
    if dtype in (FLOAT16, BFLOAT16):
        values, bits = source.ravel(), half.ravel()
        if dtype == FLOAT16:
            for i in range(values.size):
                bits[i] = float_to_half(np.float32(values[i]))
        else:
            for i in range(values.size):
                bits[i] = float_to_bfloat(np.float32(values[i]))
        _copy_rows(half, rows, columns, target, row_stride, column_stride)
    else:
        _copy_rows(source, rows, columns, target, row_stride, column_stride)


def exp(x):
    """``e**x`` in the type of ``x``; inside kernels only (see the overload below)."""
    raise NotImplementedError("cpu.elements.exp is for compiled kernels")


@overload(exp, jit_options={"error_model": "numpy"})
def _exp(x):
    if x.bitwidth == 64:
        return lambda x: math.exp(x)
    return _exp_float32


def _exp_float32(x):
    """Float32 exp that vectorises, at most 1 ulp off for x <= 88 (measured over millions of them in the test suite).

    x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 is split in two so that r is exact; e**r by its Taylor polynomial of
    degree 7; the factor 2**n in two steps so that subnormal results round once.
    """
    x = np.float32(-105.0) if x < np.float32(-105.0) else x  # e**-105 rounds to 0; a NaN passes
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    tail = np.float32(1 / 5040)
    tail = tail * r + np.float32(1 / 720)
    tail = tail * r + np.float32(1 / 120)
    tail = tail * r + np.float32(1 / 24)
    tail = tail * r + np.float32(1 / 6)
    tail = tail * r + np.float32(0.5)
    power = np.float32(1) + (r + r * r * tail)
    half = np.int32(n) // np.int32(2)
    rest = np.int32(n) - half
    bias = np.int32(127)
    power *= bits_as_float(np.uint32(half + bias) << np.uint32(23))
    return power * bits_as_float(np.uint32(rest + bias) << np.uint32(23))


@kernel()
def apply_score(tile, score, scale):
    """``tile = F(scale * tile)``, in place, for all F but "inverse" (see `vector.invert`)."""
    flat = tile.ravel()
    if score == LAPLACIAN:
        for i in range(flat.size):
            flat[i] = exp(-(scale * flat[i]))
    else:
        factor = -scale if score == NEGATIVE else scale
        for i in range(flat.size):
            flat[i] = factor * flat[i]


@kernel()
def apply_derivative(grad, scores, score, scale):
    """``grad *= F'(x) * scale``, in place, F' being a function of the score; returns whether the result is finite.

    ``scores`` is not read where F' is constant.
    """
    g, s = grad.ravel(), scores.ravel()
    infinite = False
    for i in range(g.size):
        if score == INVERSE:
            h = -(g[i] * scale * (s[i] * s[i]))
        elif score == LAPLACIAN:
            h = -(g[i] * scale * s[i])
        elif score == NEGATIVE:
            h = -(g[i] * scale)
        else:
            h = g[i] * scale
        infinite |= (h - h) != 0
        g[i] = h
    return not infinite
