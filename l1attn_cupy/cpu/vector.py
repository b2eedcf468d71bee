"""The inner loops of the CPU path, written as LLVM vector code.

Numba's vectoriser stops at 256 bits and does not keep a square tile of sums in registers, so these loops are built
instruction by instruction (``numba.extending.intrinsic``); everything around them is plain Numba. LLVM maps the
vectors onto whatever the machine has. One *panel* is ``width`` rows stored channel by channel, so that the rows of
one channel are one vector::

    rows[width][channels]  --pack-->  panel[channels][width]

The arrays are C-contiguous scratch arrays of the accumulation type, float32 or float64.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_INT = ir.IntType(64)
_LANE = ir.IntType(32)


@functools.lru_cache(maxsize=1)
def register_bytes() -> int:
    """Bytes of one vector register of this machine: 64 with AVX-512, 32 with AVX, otherwise 16 (SSE, NEON)."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx") else 16


def _has_32_registers() -> bool:
    return register_bytes() == 64 or "x86" not in llvm.get_default_triple()


def lanes(itemsize: int) -> int:
    """Numbers of ``itemsize`` bytes that one vector register holds."""
    return register_bytes() // itemsize


def panel_width(itemsize: int) -> int:
    """Rows in a panel. A tile of width x width sums must fit in the registers and hide the latency of an add."""
    n = lanes(itemsize)
    return 2 * n if n < 8 and _has_32_registers() else max(n, 4)


def vector_step(itemsize: int) -> int:
    """Numbers that `load_vector` and `store_vector` move: a row of a panel, also of its 16-bit copy."""
    return panel_width(max(itemsize, 4))


def scatter_rows(itemsize: int) -> int:
    """Rows of gradient sums that `sign_scatter` keeps in registers; divides `panel_width`."""
    return min(8 if _has_32_registers() else 4, panel_width(itemsize))


def _itemsize(array_type: Any) -> int:
    return array_type.dtype.bitwidth // 8


class _Emitter:
    """Vector types and small instruction sequences for arrays of one type and vectors of one width."""

    def __init__(self, context, builder, array_type: types.Array, width: int):
        self.context, self.builder, self.array_type = context, builder, array_type
        self.itemsize = _itemsize(array_type)
        self.scalar = context.get_data_type(array_type.dtype)
        self.width = width
        self.vector = ir.VectorType(self.scalar, width)

    def narrower(self, nbytes: int) -> _Emitter:
        """The same for vectors of at most ``nbytes`` bytes."""
        width = min(self.width, nbytes // self.itemsize)
        return _Emitter(self.context, self.builder, self.array_type, width)

    def at(self, array_type, array, *index):
        """Pointer to ``array[index]``."""
        place = [i if isinstance(i, ir.Value) else _INT(i) for i in index]
        view = self.context.make_array(array_type)(self.context, self.builder, array)
        return cgutils.get_item_pointer(
            self.context, self.builder, array_type, view, place, wraparound=False, boundscheck=False
        )

    def load(self, pointer):
        return self.builder.load(self.builder.bitcast(pointer, self.vector.as_pointer()), align=self.itemsize)

    def store(self, value, pointer):
        self.builder.store(value, self.builder.bitcast(pointer, self.vector.as_pointer()), align=self.itemsize)

    def splat(self, pointer):
        """The number at ``pointer`` in every lane."""
        return self.broadcast(self.builder.load(pointer))

    def broadcast(self, number):
        """``number`` in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, number, _LANE(0))
        return self.shuffle(first, undefined, [0] * self.width)

    def shuffle(self, a, b, order):
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_LANE, self.width), order))

    def fabs(self, value):
        name = f"llvm.fabs.v{self.width}f{self.itemsize * 8}"
        signature = ir.FunctionType(self.vector, [self.vector])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), [value])

    def accumulate(self, count, n, step, unroll=1):
        """``for i in range(count): sums = step(i, sums)`` over ``n`` vectors of sums that stay in registers.

        ``count`` is rounded up to a multiple of ``unroll``.
        """
        builder, entry = self.builder, self.builder.block
        body, done = builder.append_basic_block("l1.body"), builder.append_basic_block("l1.done")
        builder.cbranch(builder.icmp_signed(">", count, _INT(0)), body, done)

        builder.position_at_end(body)
        index = builder.phi(_INT)
        sums = [builder.phi(self.vector) for _ in range(n)]
        updated = sums
        for i in range(unroll):
            updated = step(builder.add(index, _INT(i)), updated)
        following = builder.add(index, _INT(unroll))
        index.add_incoming(_INT(0), entry)
        index.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, done)

        builder.position_at_end(done)
        totals = [builder.phi(self.vector) for _ in range(n)]
        zero = ir.Constant(self.vector, None)
        for before, after, total in zip(sums, updated, totals, strict=True):
            before.add_incoming(zero, entry)
            before.add_incoming(after, body)
            total.add_incoming(zero, entry)
            total.add_incoming(after, body)
        return totals


def _sum_panels(e, q_panels, k_panels, args):
    """Vectors ``sum_e |q_panels[q_index, e, r] - k_panels[k_index, e, :]|``, one for each row r of the panel.

    Channels go four by four, also the last of them: panels are padded with zeros.
    """
    q, q_at, k, k_at, start, count = args

    def step(i, sums):
        channel = e.builder.add(start, i)
        keys = e.load(e.at(k_panels, k, k_at, channel, 0))
        queries = [e.splat(e.at(q_panels, q, q_at, channel, row)) for row in range(e.width)]
        return [
            e.builder.fadd(total, e.fabs(e.builder.fsub(query, keys)))
            for total, query in zip(sums, queries, strict=True)
        ]

    return e.accumulate(count, e.width, step, unroll=4)


@intrinsic
def sum_abs_diff(typingctx, q_panels, q_index, k_panels, k_index, first, count, tile, column):
    """``tile[r, column + c] += sum_e |q_panels[q_index, e, r] - k_panels[k_index, e, c]|``, r and c < panel width.

    e runs from ``first``, upwards, over ``count`` channels. With ``first == 0`` the tile is set, not added to.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, q_panels, panel_width(_itemsize(q_panels)))
        *operands, out, left = args
        totals = _sum_panels(e, q_panels, k_panels, operands)
        places = [e.at(tile, out, row, left) for row in range(e.width)]
        with builder.if_else(builder.icmp_signed("==", operands[-2], _INT(0))) as (is_first, is_more):
            with is_first:
                for place, total in zip(places, totals, strict=True):
                    e.store(total, place)
            with is_more:
                for place, total in zip(places, totals, strict=True):
                    e.store(builder.fadd(e.load(place), total), place)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(q_panels, integer, k_panels, integer, integer, integer, tile, integer), codegen


@intrinsic
def sign_gather(typingctx, q, tangent_q, q_index, k, tangent_k, k_index, first, count, tile, column):
    """Tangents of distances of a panel of queries and one of keys, all four arrays being panels::

        tile[r, column + c] += sum_e sign(q[q_index, e, r] - k[k_index, e, c])
                                     * (tangent_q[q_index, e, r] - tangent_k[k_index, e, c])

    r and c are below the panel width; e runs from ``first``, upwards, over ``count`` channels. With ``first == 0`` the
    tile is set, not added to. The sign of 0 and of NaN is 0.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, q, panel_width(_itemsize(q)))
        q_at, tq_at, row_panel, k_at, tk_at, key_panel, start, n, out, left = args
        ones, minus, zero = (ir.Constant(e.vector, [x] * e.width) for x in (1.0, -1.0, 0.0))

        def step(i, sums):
            channel = builder.add(start, i)
            keys, key_tangents = (
                e.load(e.at(kind, at, key_panel, channel, 0)) for kind, at in ((k, k_at), (tangent_k, tk_at))
            )
            updated = []
            for row, total in enumerate(sums):
                query, tangent = (
                    e.splat(e.at(kind, at, row_panel, channel, row)) for kind, at in ((q, q_at), (tangent_q, tq_at))
                )
                below = builder.select(builder.fcmp_ordered("<", query, keys), minus, zero)
                sign = builder.select(builder.fcmp_ordered(">", query, keys), ones, below)
                updated.append(builder.fadd(total, builder.fmul(sign, builder.fsub(tangent, key_tangents))))
            return updated

        totals = e.accumulate(n, e.width, step)
        is_first = builder.icmp_signed("==", start, _INT(0))
        for row, total in enumerate(totals):
            place = e.at(tile, out, row, left)
            with builder.if_else(is_first) as (set_it, add_to_it):
                with set_it:
                    e.store(total, place)
                with add_to_it:
                    e.store(builder.fadd(e.load(place), total), place)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(q, tangent_q, integer, k, tangent_k, integer, integer, integer, tile, integer), codegen


def _store_inverse(e, distance, scale, eps, place):
    """``place[:width] = 1 / (eps + scale * distance)``, for a vector of distances and a pointer to numbers.

    Divisions are in pieces of at most 32 bytes: two take less than half the time of one of an AVX-512 register.
    """
    piece = e.narrower(32)
    one = ir.Constant(piece.vector, [1.0] * piece.width)
    for start in range(0, e.width, piece.width):
        lanes_of_piece = ir.Constant(ir.VectorType(_LANE, piece.width), list(range(start, start + piece.width)))
        x = e.builder.fmul(piece.broadcast(scale), e.builder.shuffle_vector(distance, distance, lanes_of_piece))
        inverse = e.builder.fdiv(one, e.builder.fadd(piece.broadcast(eps), x))
        piece.store(inverse, e.builder.gep(place, [_INT(start)]))


@intrinsic
def invert(typingctx, tile, column, scale, eps):
    """``tile[r, column + c] = 1 / (eps + scale * tile[r, column + c])``, r and c < panel width."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, tile, panel_width(_itemsize(tile)))
        out, left, scale, eps = args
        for row in range(e.width):
            place = e.at(tile, out, row, left)
            _store_inverse(e, e.load(place), scale, eps, place)
        return context.get_dummy_value()

    return types.void(tile, types.intp, tile.dtype, tile.dtype), codegen


@intrinsic
def store_scores(typingctx, q_panels, q_index, k_panels, k_index, count, target, stride, inverse, scale, eps):
    """Scores of a panel of queries and one of keys, of ``count`` channels, straight to where they belong::

        x = sum_e |q_panels[q_index, e, r] - k_panels[k_index, e, c]|              r and c < panel width
        target[r * stride + c] = 1 / (eps + scale * x) if inverse else scale * x

    ``target`` is an address, ``stride`` counts numbers. Sums, F and stores overlap with the sums of the next panel.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, q_panels, panel_width(_itemsize(q_panels)))
        *operands, count, address, stride, inverse, scale, eps = args
        totals = _sum_panels(e, q_panels, k_panels, (*operands, _INT(0), count))
        first = builder.inttoptr(address, e.scalar.as_pointer())
        places = [builder.gep(first, [builder.mul(_INT(row), stride)]) for row in range(e.width)]
        with builder.if_else(inverse) as (is_inverse, is_linear):
            with is_inverse:
                for place, total in zip(places, totals, strict=True):
                    _store_inverse(e, total, scale, eps, place)
            with is_linear:
                for place, total in zip(places, totals, strict=True):
                    e.store(builder.fmul(e.broadcast(scale), total), place)
        return context.get_dummy_value()

    integer, number = types.intp, q_panels.dtype
    numbers = (types.boolean, number, number)
    return types.void(q_panels, integer, k_panels, integer, integer, integer, integer, *numbers), codegen


@intrinsic
def pack(typingctx, rows, row, channels, panels, index):
    """``panels[index, e, r] = rows[row + r, e]`` for e < channels, which is a multiple of the panel width."""

    def codegen(context, builder, signature, args):
        width = panel_width(_itemsize(rows))
        e = _Emitter(context, builder, rows, width)
        source, first_row, n, target, target_at = args
        low = [i // 2 + width * (i % 2) for i in range(width)]
        high = [width // 2 + i for i in low]
        with cgutils.for_range_slice(builder, _INT(0), n, _INT(width)) as (first, _):
            block = [e.load(e.at(rows, source, builder.add(first_row, _INT(r)), first)) for r in range(width)]
            for _ in range(width.bit_length() - 1):  # log2(width) perfect shuffles of the rows transpose the block
                pairs = zip(block[: width // 2], block[width // 2 :], strict=True)
                block = [e.shuffle(a, b, order) for a, b in pairs for order in (low, high)]
            for i, vector in enumerate(block):
                e.store(vector, e.at(panels, target, target_at, builder.add(first, _INT(i)), 0))
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, panels, types.intp), codegen


@intrinsic
def sign_scatter(typingctx, x, row, y, h, panel, column, count, channel, dx):
    """``dx[row + r, e] += sum_j h[panel, j, column + r] * sign(x[row + r, e] - y[j, e])``, j = 0..count-1 in order.

    r runs over `scatter_rows`, e over the `lanes` channels from ``channel`` on. A tie adds nothing, and neither does
    a NaN in x or y; ``h`` must be finite.
    """

    def codegen(context, builder, signature, args):
        rows = scatter_rows(_itemsize(x))
        e = _Emitter(context, builder, x, lanes(_itemsize(x)))
        x_at, first, y_at, h_at, part, offset, n, chan, out = args
        row_numbers = [builder.add(first, _INT(r)) for r in range(rows)]
        x_rows = [e.load(e.at(x, x_at, r, chan)) for r in row_numbers]

        def step(j, sums):
            y_row = e.load(e.at(y, y_at, j, chan))
            updated = []
            for r, (x_row, total) in enumerate(zip(x_rows, sums, strict=True)):
                weight = e.splat(e.at(h, h_at, part, j, builder.add(offset, _INT(r))))
                above = builder.fcmp_ordered(">", x_row, y_row)
                below = builder.fcmp_ordered("<", x_row, y_row)
                total = builder.select(above, builder.fadd(total, weight), total)
                updated.append(builder.select(below, builder.fsub(total, weight), total))
            return updated

        for r, total in zip(row_numbers, e.accumulate(n, rows, step), strict=True):
            place = e.at(dx, out, r, chan)
            e.store(builder.fadd(e.load(place), total), place)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(x, integer, y, h, integer, integer, integer, integer, dx), codegen


@intrinsic
def load_vector(typingctx, source, index, rows, row, column):
    """``rows[row, column:column + n] = source[index:index + n]``, n = `vector_step`; ``source`` is an address."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, rows, vector_step(_itemsize(rows)))
        address, first, target, r, c = args
        pointer = builder.gep(builder.inttoptr(address, e.scalar.as_pointer()), [first])
        e.store(e.load(pointer), e.at(rows, target, r, c))
        return context.get_dummy_value()

    integer = types.intp
    return types.void(integer, integer, rows, integer, integer), codegen


@intrinsic
def store_vector(typingctx, rows, row, column, target, index):
    """``target[index:index + n] = rows[row, column:column + n]``, n = `vector_step`; ``target`` is an address."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, rows, vector_step(_itemsize(rows)))
        source, r, c, address, first = args
        pointer = builder.gep(builder.inttoptr(address, e.scalar.as_pointer()), [first])
        e.store(e.load(e.at(rows, source, r, c)), pointer)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(rows, integer, integer, integer, integer), codegen


@intrinsic
def peek(typingctx, address, index, like):
    """The number of ``like``'s type at ``address[index]``."""

    def codegen(context, builder, signature, args):
        data_type = context.get_data_type(like)
        pointer = builder.inttoptr(args[0], data_type.as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return like(types.intp, types.intp, like), codegen


@intrinsic
def poke(typingctx, address, index, value):
    """``address[index] = value``."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_data_type(value).as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, value), codegen


@intrinsic
def bits_as_float(typingctx, bits):
    """The float32 whose bit pattern is the uint32 ``bits``."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def float_as_bits(typingctx, value):
    """The bit pattern of a float32, as uint32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _LANE)

    return types.uint32(types.float32), codegen
