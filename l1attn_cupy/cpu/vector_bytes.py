"""Sums of absolute differences of bytes, as LLVM vector code; the counterpart of `vector` for 8-bit numbers.

Eight channels of a row are one *word*, a uint64. A panel is ``width`` rows stored word by word, so that the words of
a few rows are one vector::

    rows[width][words]  ->  panel[words][width]

A lane of a vector of sums belongs to one row: it takes up the eight differences of a word at once. x86 has an
instruction for just that. Elsewhere differences are formed byte by byte and their neighbours added three times.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vector import _INT, _LANE, _Emitter, lanes

#: Queries in a panel: few enough for sums to stay in registers, with two vectors of keys to hide the latency of loads.
QUERY_ROWS = 4

_BYTE = ir.IntType(8)


def key_rows() -> int:
    """Keys in a panel, two vectors of words."""
    return 2 * lanes(8)


@intrinsic
def byte_distances(typingctx, q_panels, q_index, k_panels, k_index, count, tile, row, column):
    """``tile[row + r, column + c]`` becomes the distance of row r of a panel of queries and row c of a panel of keys.

    The panels have ``count`` words of unsigned bytes. Sums are exact below 2**31, then rounded to float32.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, k_panels, lanes(8))
        numbers = _Emitter(context, builder, tile, key_rows())
        q, q_at, k, k_at, n, out, top, left = args
        features = context.codegen().magic_tuple()[2]

        def step(word, sums):
            keys = [e.load(e.at(k_panels, k, k_at, word, half * e.width)) for half in range(2)]
            queries = [e.splat(e.at(q_panels, q, q_at, word, r)) for r in range(QUERY_ROWS)]
            pairs = [(query, key) for query in queries for key in keys]
            return [
                builder.add(total, sums_of_words(builder, features, *pair))
                for total, pair in zip(sums, pairs, strict=True)
            ]

        totals = e.accumulate(n, 2 * QUERY_ROWS, step)
        for r in range(QUERY_ROWS):
            both = _joined(builder, totals[2 * r], totals[2 * r + 1])
            place = numbers.at(tile, out, builder.add(top, _INT(r)), left)
            numbers.store(builder.sitofp(both, numbers.vector), place)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(q_panels, integer, k_panels, integer, integer, tile, integer, integer), codegen


@intrinsic
def peek_word(typingctx, address):
    """The eight bytes at ``address``, which need not be aligned."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], _INT.as_pointer()), align=1)

    return types.uint64(types.intp), codegen


def _joined(builder, low, high):
    """The sums of two vectors as 32-bit numbers of one."""
    n = low.type.count
    narrow = [builder.trunc(part, ir.VectorType(_LANE, n)) for part in (low, high)]
    return builder.shuffle_vector(*narrow, ir.Constant(ir.VectorType(_LANE, 2 * n), list(range(2 * n))))


def sums_of_words(builder, features, a, b):
    """For each lane of two vectors of words the sum of the absolute differences of its eight bytes.

    ``features`` are those of the machine, as LLVM lists them.
    """
    nbytes = 8 * a.type.count
    a, b = (builder.bitcast(x, ir.VectorType(_BYTE, nbytes)) for x in (a, b))
    if "x86_64" in builder.module.triple:
        return _by_instruction(builder, features.split(","), a, b)
    low, high = (_call(builder, f"llvm.{name}.v{nbytes}i8", a.type, [a, b]) for name in ("umin", "umax"))
    sums = builder.sub(high, low)
    for bits in (16, 32, 64):
        sums = _neighbours_added(builder, sums, ir.VectorType(ir.IntType(bits), 8 * nbytes // bits))
    return sums


def _by_instruction(builder, features, a, b):
    """By vpsadbw, in pieces that the instruction set has; each x86-64 has that of 128 bits."""
    most = 64 if "+avx512bw" in features else 32 if "+avx2" in features else 16
    name = {64: "avx512.psad.bw.512", 32: "avx2.psad.bw", 16: "sse2.psad.bw"}
    size = min(most, a.type.count)
    parts = []
    for start in range(0, a.type.count, size):
        order = ir.Constant(ir.VectorType(_LANE, size), list(range(start, start + size)))
        pieces = [builder.shuffle_vector(x, x, order) for x in (a, b)]
        parts.append(_call(builder, f"llvm.x86.{name[size]}", ir.VectorType(_INT, size // 8), pieces))
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        order = ir.Constant(ir.VectorType(_LANE, n), list(range(n)))
        parts = [builder.shuffle_vector(*pair, order) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _neighbours_added(builder, narrow, wide):
    """Sums of two neighbours each, in numbers of twice the size."""
    if "aarch64" in builder.module.triple:
        bits = wide.element.width
        name = f"llvm.aarch64.neon.uaddlp.v{wide.count}i{bits}.v{2 * wide.count}i{bits // 2}"
        return _call(builder, name, wide, [narrow])
    half = wide.element.width // 2
    pairs = builder.bitcast(narrow, wide)
    even = builder.and_(pairs, ir.Constant(wide, [(1 << half) - 1] * wide.count))
    return builder.add(even, builder.lshr(pairs, ir.Constant(wide, [half] * wide.count)))


def _call(builder, name, result, arguments):
    signature = ir.FunctionType(result, [x.type for x in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)
