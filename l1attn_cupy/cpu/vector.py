"""The inner loops of the CPU path, written as LLVM vector code.

Numba's vectoriser stops at 256 bits and does not keep a square tile of sums in registers, so these loops are built
instruction by instruction (``numba.extending.intrinsic``); everything around them is plain Numba. LLVM maps the
vectors onto whatever the machine has. One *panel* is ``width`` rows stored channel by channel, so that the rows of
one channel are one vector::

    rows[width][channels]  --pack-->  panel[channels][width]

The arrays are C-contiguous scratch arrays of the accumulation type, float32 or float64.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

#: Bytes in a cache line, or more.
CACHE_LINE = 64

_INT = ir.IntType(64)
_LANE = ir.IntType(32)


#: For VFIXUPIMM, of each kind of number (quiet and signalling NaN, 0, 1, -inf, inf, negative, positive, lowest digit
#: first) what it becomes: 8 is 0, 9 is -1, 0xA is 1.
_SIGN_TABLE = 0xA9A9A888


@functools.lru_cache(maxsize=1)
def register_bytes() -> int:
    """Bytes of one vector register of this machine: 64 with AVX-512, 32 with AVX, otherwise 16 (SSE, NEON)."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx") else 16


def has_32_registers() -> bool:
    return register_bytes() == 64 or "x86" not in llvm.get_default_triple()


@functools.lru_cache(maxsize=1)
def _adds_by_multiplying() -> bool:
    """Whether every second addition had better be ``a * 1 + b``.

    Of processors with AVX2, many have other units for additions than for fused multiply-adds, and all have as many of
    these. With AVX-512, AMD's have both; Intel's have one kind of unit for both.
    """
    wide = register_bytes() == 64 and not llvm.get_host_cpu_name().startswith("znver")
    return register_bytes() >= 32 and not wide and bool(llvm.get_host_cpu_features().get("fma"))


def lanes(itemsize: int) -> int:
    """Numbers of ``itemsize`` bytes that one vector register holds."""
    return register_bytes() // itemsize


def panel_width(itemsize: int) -> int:
    """Rows in a panel: two registers, where one of them would not be large."""
    n = lanes(itemsize)
    return n if n >= 8 and has_32_registers() else max(2 * n, 4)


def sum_rows(itemsize: int) -> int:
    """Rows of a panel whose sums with all rows of another one are made at once; divides `panel_width`.

    The sums must fit in the registers and hide the latency of an addition. With 16 registers, 4 rows and two registers
    of lanes need fewer loads than 8 rows and one.
    """
    return panel_width(itemsize) if has_32_registers() else 4


def vector_step(itemsize: int) -> int:
    """Numbers that `load_vector` and `store_vector` move: those of a register, also of its 16-bit copy."""
    return lanes(max(itemsize, 4))


def scatter_rows(itemsize: int) -> int:
    """Rows of gradient sums that `sign_scatter` keeps in registers; divides `panel_width`."""
    return min(8 if has_32_registers() else 4, panel_width(itemsize))


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

    def store_past_caches(self, value, pointer):
        """The same, for a pointer to the begin of a cache line: the line is not read first, and no cache keeps it."""
        store = self.builder.store(value, self.builder.bitcast(pointer, self.vector.as_pointer()), align=CACHE_LINE)
        store.set_metadata("nontemporal", self.builder.module.add_metadata([ir.IntType(32)(1)]))

    def prefetch(self, pointer):
        """Ask for the cache line of any address, and do not wait for it."""
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(self.builder.module, signature, "llvm.prefetch.p0")
        reading, nearest, data = number(0), number(3), number(1)
        self.builder.call(function, [self.builder.bitcast(pointer, byte), reading, nearest, data])

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

    def multiply_add(self, a, b, c):
        """``a * b + c``, rounded once where the machine can."""
        name = f"llvm.fmuladd.v{self.width}f{self.itemsize * 8}"
        signature = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), [a, b, c])

    def opaque_one(self):
        """1 in every lane, which LLVM does not know to be 1; None where `plus` has no use for it."""
        if not _adds_by_multiplying():
            return None
        itself = ir.InlineAsm(ir.FunctionType(self.scalar, [self.scalar]), "", "=x,0")
        return self.broadcast(self.builder.call(itself, [ir.Constant(self.scalar, 1.0)]))

    def plus(self, a, b, one):
        """``a + b``, by a unit that multiplies and adds if there is ``one``; the bits are the same."""
        return self.builder.fadd(a, b) if one is None else self.multiply_add(b, one, a)

    def sign(self, value):
        """1, -1, or 0, also for NaN. With AVX-512 that is one instruction, at the rate of an addition."""
        if register_bytes() == 64 and self.width * self.itemsize == 64:
            return self._fix_up(value, _SIGN_TABLE)
        one, zero = (ir.Constant(self.vector, [x] * self.width) for x in (1.0, 0.0))
        name = f"llvm.copysign.v{self.width}f{self.itemsize * 8}"
        signature = ir.FunctionType(self.vector, [self.vector] * 2)
        copysign = cgutils.get_or_insert_function(self.builder.module, signature, name)
        signed = self.builder.call(copysign, [one, value])
        return self.builder.select(self.builder.fcmp_ordered("!=", value, zero), signed, zero)

    def _fix_up(self, value, table):
        """AVX-512's VFIXUPIMM: what each kind of number is to become, by a table of codes."""
        letter, mask, integer = ("s", 16, 32) if self.itemsize == 4 else ("d", 8, 64)
        name = f"llvm.x86.avx512.mask.fixupimm.p{letter}.512"
        tables = ir.VectorType(ir.IntType(integer), self.width)
        number = ir.IntType(32)
        kinds = [self.vector, self.vector, tables, number, ir.IntType(mask), number]
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.vector, kinds), name)
        every_lane, rounding = ir.IntType(mask)(-1), number(4)
        codes = ir.Constant(tables, [table] * self.width)
        return self.builder.call(function, [value, value, codes, number(0), every_lane, rounding])

    def no_nan(self, value):
        """Whether no lane is NaN."""
        found = self.builder.fcmp_unordered("uno", value, value)
        number = ir.IntType(self.width)
        return self.builder.icmp_signed("==", self.builder.bitcast(found, number), number(0))

    def zeros(self, n):
        return [ir.Constant(self.vector, None)] * n

    def accumulate(self, count, n, step, unroll=1):
        """``for i in range(count): sums = step(i, sums)``, from ``n`` vectors of zeros, ``unroll`` steps a turn."""
        whole = self.builder.and_(count, _INT(-unroll))
        sums = self.loop(_INT(0), whole, self.zeros(n), self.unrolled(step, unroll), unroll)
        return self.loop(whole, count, sums, step) if unroll > 1 else sums

    def unrolled(self, step, times):
        """A step that does ``times`` steps."""

        def steps(first, sums):
            for i in range(times):
                sums = step(self.builder.add(first, _INT(i)), sums)
            return sums

        return steps

    def loop(self, first, end, sums, step, stride=1):
        """``for i in range(first, end, stride): sums = step(i, sums)``; the vectors of sums stay in registers.

        ``end - first`` is a multiple of ``stride``.
        """
        builder, entry = self.builder, self.builder.block
        body, done = builder.append_basic_block("l1.body"), builder.append_basic_block("l1.done")
        builder.cbranch(builder.icmp_signed("<", first, end), body, done)

        builder.position_at_end(body)
        index = builder.phi(_INT)
        inside = [builder.phi(self.vector) for _ in sums]
        updated = step(index, inside)
        following, last = builder.add(index, _INT(stride)), builder.block
        index.add_incoming(first, entry)
        index.add_incoming(following, last)
        builder.cbranch(builder.icmp_signed("<", following, end), body, done)

        builder.position_at_end(done)
        totals = [builder.phi(self.vector) for _ in sums]
        for before, start, after, total in zip(inside, sums, updated, totals, strict=True):
            before.add_incoming(start, entry)
            before.add_incoming(after, last)
            total.add_incoming(start, entry)
            total.add_incoming(after, last)
        return totals


#: Channels in one turn of the loop that sums them.
SUM_UNROLL = 4


def _term(e, q_panels, k_panels, args):
    """The step of a loop over channels: ``sums[r] += |q_panels[q_index, first + i, top + r] - k_panels[...]|``.

    A difference and a sum are two additions, of which `_Emitter.plus` makes the second. The number that is in every
    lane is subtracted from the others, as AVX-512 can read it from memory in the same instruction.
    """
    q, q_at, k, k_at, first, top = args
    one = e.opaque_one()

    def step(i, sums):
        channel = e.builder.add(first, i)
        keys = e.load(e.at(k_panels, k, k_at, channel, 0))
        updated = []
        for row, total in enumerate(sums):
            query = e.splat(e.at(q_panels, q, q_at, channel, e.builder.add(top, _INT(row))))
            updated.append(e.plus(total, e.fabs(e.builder.fsub(keys, query)), one))
        return updated

    return step


def _sum_panels(e, q_panels, k_panels, args):
    """Vectors ``sum_e |q_panels[q_index, e, top + r] - k_panels[k_index, e, :]|``, one for each of `sum_rows` rows."""
    *operands, first, count, top = args
    return e.accumulate(count, sum_rows(e.itemsize), _term(e, q_panels, k_panels, (*operands, first, top)), SUM_UNROLL)


@contextlib.contextmanager
def _row_groups(e):
    """A loop over the rows of a panel, `sum_rows` at a time; yields the first of them."""
    rows = sum_rows(e.itemsize)
    with cgutils.for_range_slice(e.builder, _INT(0), _INT(panel_width(e.itemsize)), _INT(rows)) as (top, _):
        yield top


def _set_or_add(e, start, totals, places):
    """Store ``totals`` if ``start`` is 0, otherwise add them to what is there."""
    with e.builder.if_else(e.builder.icmp_signed("==", start, _INT(0))) as (is_first, is_more):
        with is_first:
            for place, total in zip(places, totals, strict=True):
                e.store(total, place)
        with is_more:
            for place, total in zip(places, totals, strict=True):
                e.store(e.builder.fadd(e.load(place), total), place)


@intrinsic
def sum_abs_diff(typingctx, q_panels, q_index, k_panels, k_index, first, count, tile, column):
    """``tile[r, column + c] += sum_e |q_panels[q_index, e, r] - k_panels[k_index, e, c]|``, r and c < panel width.

    e runs from ``first``, upwards, over ``count`` channels. With ``first == 0`` the tile is set, not added to.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, q_panels, panel_width(_itemsize(q_panels)))
        *operands, out, left = args
        with _row_groups(e) as top:
            totals = _sum_panels(e, q_panels, k_panels, (*operands, top))
            places = [e.at(tile, out, builder.add(top, _INT(r)), left) for r in range(len(totals))]
            _set_or_add(e, operands[-2], totals, places)
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

        def step(top, i, sums):
            channel = builder.add(start, i)
            keys, key_tangents = (
                e.load(e.at(kind, at, key_panel, channel, 0)) for kind, at in ((k, k_at), (tangent_k, tk_at))
            )
            updated = []
            for row, total in enumerate(sums):
                query, tangent = (
                    e.splat(e.at(kind, at, row_panel, channel, builder.add(top, _INT(row))))
                    for kind, at in ((q, q_at), (tangent_q, tq_at))
                )
                below = builder.select(builder.fcmp_ordered("<", query, keys), minus, zero)
                sign = builder.select(builder.fcmp_ordered(">", query, keys), ones, below)
                updated.append(builder.fadd(total, builder.fmul(sign, builder.fsub(tangent, key_tangents))))
            return updated

        with _row_groups(e) as top:
            totals = e.accumulate(n, sum_rows(e.itemsize), functools.partial(step, top))
            places = [e.at(tile, out, builder.add(top, _INT(r)), left) for r in range(len(totals))]
            _set_or_add(e, start, totals, places)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(q, tangent_q, integer, k, tangent_k, integer, integer, integer, tile, integer), codegen


def _inverse(e, distance, scale, eps):
    """``1 / (eps + scale * distance)``, for a vector of distances and two numbers.

    Divisions are in pieces of at most 32 bytes: two take less than half the time of one of an AVX-512 register.
    """
    piece = e.narrower(32)
    one = ir.Constant(piece.vector, [1.0] * piece.width)
    scales, summands = piece.broadcast(scale), piece.broadcast(eps)
    inverses = []
    for start in range(0, e.width, piece.width):
        lanes_of_piece = ir.Constant(ir.VectorType(_LANE, piece.width), list(range(start, start + piece.width)))
        x = e.builder.fmul(scales, e.builder.shuffle_vector(distance, distance, lanes_of_piece))
        inverses.append(e.builder.fdiv(one, e.builder.fadd(summands, x)))
    while len(inverses) > 1:
        both = ir.Constant(ir.VectorType(_LANE, 2 * inverses[0].type.count), list(range(2 * inverses[0].type.count)))
        pairs = zip(inverses[::2], inverses[1::2], strict=True)
        inverses = [e.builder.shuffle_vector(low, high, both) for low, high in pairs]
    return inverses[0]


@intrinsic
def invert(typingctx, tile, column, scale, eps):
    """``tile[r, column + c] = 1 / (eps + scale * tile[r, column + c])``, r and c < panel width."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, tile, panel_width(_itemsize(tile)))
        out, left, scale, eps = args
        for row in range(e.width):
            place = e.at(tile, out, row, left)
            e.store(_inverse(e, e.load(place), scale, eps), place)
        return context.get_dummy_value()

    return types.void(tile, types.intp, tile.dtype, tile.dtype), codegen


def _scores_to(e, tile, tile_at, target, f):
    """The step of a loop over rows that stores F of a row of the tile; see `sum_and_score`."""
    address, stride, past_caches = target
    inverse, scale, eps = f
    builder = e.builder
    first = builder.inttoptr(address, e.scalar.as_pointer())

    def put(score, place):
        with builder.if_else(past_caches) as (past, through):
            with past:
                e.store_past_caches(score, place)
            with through:
                e.store(score, place)

    def store(row, sums):
        distance, place = e.load(e.at(tile, tile_at, row, 0)), builder.gep(first, [builder.mul(row, stride)])
        with builder.if_else(inverse) as (is_inverse, is_linear):
            with is_inverse:
                put(_inverse(e, distance, scale, eps), place)
            with is_linear:
                put(builder.fmul(e.broadcast(scale), distance), place)
        return sums

    return store


@intrinsic
def sum_and_score(
    typingctx, q_panels, q_index, k_panels, k_index, count, tile, target, stride, past_caches, inverse, scale, eps
):
    """Scores of the distances in the tile, straight to where they belong; then new distances, of two panels, in it::

        target[r * stride + c] = 1 / (eps + scale * tile[r, c]) if inverse else scale * tile[r, c]
        tile[r, c] = sum_e |q_panels[q_index, e, r] - k_panels[k_index, e, c]|         r and c < panel width, e < count

    ``target`` is an address, ``stride`` counts numbers. Where rows of the target begin with a cache line, it can be
    written ``past_caches``; a `fence` must come before others read it. A few rows are scored in each turn of the loop
    over channels, so that divisions and stores, which would hold up the sums if they came all at once, are done on the
    side.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, q_panels, panel_width(_itemsize(q_panels)))
        *operands, count, sums_at, address, stride, past_caches, inverse, scale, eps = args
        store = _scores_to(e, tile, sums_at, (address, stride, past_caches), (inverse, scale, eps))
        rows = sum_rows(e.itemsize)
        whole = builder.and_(count, _INT(-SUM_UNROLL))
        head = builder.select(builder.icmp_signed("<", whole, _INT(rows)), whole, _INT(rows))
        with _row_groups(e) as top:
            step = _term(e, q_panels, k_panels, (*operands, _INT(0), top))
            store_row = lambda r, sums: store(builder.add(top, r), sums)  # noqa: E731
            sum_step, store_step = e.unrolled(step, SUM_UNROLL), e.unrolled(store_row, SUM_UNROLL)
            both = lambda i, sums: sum_step(i, store_step(i, sums))  # noqa: E731
            sums = e.loop(_INT(0), head, e.zeros(rows), both, SUM_UNROLL)
            sums = e.loop(head, whole, sums, sum_step, SUM_UNROLL)
            sums = e.loop(whole, count, sums, step)
            e.loop(head, _INT(rows), [], store_row)
            for row, total in enumerate(sums):
                e.store(total, e.at(tile, sums_at, builder.add(top, _INT(row)), 0))
        return context.get_dummy_value()

    integer, number = types.intp, q_panels.dtype
    options = (types.boolean, types.boolean, number, number)
    return types.void(q_panels, integer, k_panels, integer, integer, tile, integer, integer, *options), codegen


@intrinsic
def fence(typingctx):
    """What was stored before can be read by other threads before anything that is stored later."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _pack(e, load, channels, panels, target, index):
    """``panels[index, first + i, top + r] = load(top + r, first)[i]``; channels are a multiple of the width of e."""
    builder, size = e.builder, e.width
    low = [i // 2 + size * (i % 2) for i in range(size)]
    high = [size // 2 + i for i in low]

    def transpose(top, first):
        block = [load(top + r, first) for r in range(size)]
        for _ in range(size.bit_length() - 1):  # log2(size) perfect shuffles of the rows transpose the block
            pairs = zip(block[: size // 2], block[size // 2 :], strict=True)
            block = [e.shuffle(a, b, order) for a, b in pairs for order in (low, high)]
        for i, vector in enumerate(block):
            e.store(vector, e.at(panels, target, index, builder.add(first, _INT(i)), top))

    with cgutils.for_range_slice(builder, _INT(0), channels, _INT(size)) as (first, _):
        for top in range(0, panel_width(e.itemsize), size):
            transpose(top, first)


@intrinsic
def pack(typingctx, rows, row, channels, panels, index):
    """``panels[index, e, r] = rows[row + r, e]`` for e < channels, which is a multiple of `lanes`."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, rows, lanes(_itemsize(rows)))
        source, first_row, n, target, target_at = args

        def load(row, first):
            return e.load(e.at(rows, source, builder.add(first_row, _INT(row)), first))

        _pack(e, load, n, panels, target, target_at)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, panels, types.intp), codegen


@intrinsic
def pack_from(typingctx, address, stride, channels, panels, index):
    """The same for the rows from ``address`` on, numbers of the type of panels; ``stride`` counts numbers."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, panels, lanes(_itemsize(panels)))
        source, row_stride, n, target, target_at = args
        start = builder.inttoptr(source, e.scalar.as_pointer())

        def place(row, first):
            return builder.gep(start, [builder.add(builder.mul(_INT(row), row_stride), first)])

        def load(row, first):
            e.prefetch(place(row + panel_width(e.itemsize), first))
            return e.load(place(row, first))

        _pack(e, load, n, panels, target, target_at)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, panels, types.intp), codegen


@intrinsic
def chain_rule(typingctx, grad, grad_stride, scores, scores_stride, rows, columns, power, factor, h):
    """``h[r, c] = factor * grad[r, c] * scores[r, c]**power``, power being 0, 1 or 2; returns whether it is finite.

    ``grad`` and ``scores`` are addresses, the strides between rows count numbers; ``columns`` is a multiple of `lanes`.
    scores is read in any case.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, h, lanes(_itemsize(h)))
        *sources, n, columns, exponent, scale, target = args
        pointers = [builder.inttoptr(address, e.scalar.as_pointer()) for address in sources[::2]]
        zero, one = (ir.Constant(e.vector, [x] * e.width) for x in (0.0, 1.0))

        def one_row(r, checks):
            starts = [builder.mul(r, stride) for stride in sources[1::2]]

            def some(c, checks):
                g, s = (
                    e.load(builder.gep(pointer, [builder.add(start, c)]))
                    for pointer, start in zip(pointers, starts, strict=True)
                )
                square = builder.select(builder.icmp_signed("==", exponent, _INT(2)), builder.fmul(s, s), s)
                powered = builder.select(builder.icmp_signed("==", exponent, _INT(0)), one, square)
                result = builder.fmul(builder.fmul(g, e.broadcast(scale)), powered)
                e.store(result, e.at(h, target, r, c))
                return [e.multiply_add(result, zero, checks[0])]  # 0, or NaN

            return e.loop(_INT(0), columns, checks, some, e.width)

        (check,) = e.loop(_INT(0), n, [zero], one_row)
        return e.no_nan(check)

    integer = types.intp
    return types.boolean(*[integer] * 7, h.dtype, h), codegen


@intrinsic
def all_finite(typingctx, rows, count):
    """Whether the first ``count`` rows are, which are a multiple of `lanes` long."""

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, rows, lanes(_itemsize(rows)))
        array, n = args
        columns = builder.extract_value(context.make_array(rows)(context, builder, array).shape, 1)
        size, first = builder.mul(n, columns), e.at(rows, array, 0, 0)
        zero = ir.Constant(e.vector, None)

        def some(i, checks):
            places = [builder.gep(first, [builder.add(i, _INT(c * e.width))]) for c in range(len(checks))]
            return [e.multiply_add(e.load(at), zero, check) for at, check in zip(places, checks, strict=True)]

        step = 4 * e.width
        whole = builder.and_(size, _INT(-step))
        checks = e.loop(_INT(0), whole, e.zeros(4), some, step)  # each 0, or NaN
        checks += e.loop(whole, size, e.zeros(1), some, e.width)
        return e.no_nan(functools.reduce(builder.fadd, checks))

    return types.boolean(rows, types.intp), codegen


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
                updated.append(e.multiply_add(e.sign(builder.fsub(x_row, y_row)), weight, total))
            return updated

        for r, total in zip(row_numbers, e.accumulate(n, rows, step), strict=True):
            place = e.at(dx, out, r, chan)
            e.store(builder.fadd(e.load(place), total), place)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(x, integer, y, h, integer, integer, integer, integer, dx), codegen


@intrinsic
def sign_scatter_both(typingctx, x, row, y, h, column, count, channel, dx, dy):
    """As `sign_scatter` of ``h[0]``, and the same from the side of y, one sign for both; j < count, r in order::

    dx[row + r, e] += sum_j h[0, j, column + r] * sign(x[row + r, e] - y[j, e])
    dy[j, e]       += sum_r h[0, j, column + r] * sign(y[j, e] - x[row + r, e])
    """

    def codegen(context, builder, signature, args):
        rows = scatter_rows(_itemsize(x))
        e = _Emitter(context, builder, x, lanes(_itemsize(x)))
        x_at, first, y_at, h_at, offset, n, chan, out, out_y = args
        row_numbers = [builder.add(first, _INT(r)) for r in range(rows)]
        x_rows = [e.load(e.at(x, x_at, r, chan)) for r in row_numbers]

        def step(j, sums):
            y_row, place = e.load(e.at(y, y_at, j, chan)), e.at(dy, out_y, j, chan)
            y_sum, updated = e.load(place), []
            for r, (x_row, total) in enumerate(zip(x_rows, sums, strict=True)):
                weight = e.splat(e.at(h, h_at, 0, j, builder.add(offset, _INT(r))))
                sign = e.sign(builder.fsub(x_row, y_row))
                updated.append(e.multiply_add(sign, weight, total))
                y_sum = e.multiply_add(builder.fneg(sign), weight, y_sum)
            e.store(y_sum, place)
            return updated

        for r, total in zip(row_numbers, e.accumulate(n, rows, step), strict=True):
            place = e.at(dx, out, r, chan)
            e.store(builder.fadd(e.load(place), total), place)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(x, integer, y, h, integer, integer, integer, dx, dy), codegen


@intrinsic
def load_vector(typingctx, source, index, rows, row, column, ahead):
    """``rows[row, column:column + n] = source[index:index + n]``, n = `vector_step`; ``source`` is an address.

    ``ahead`` numbers further is what will be loaded later.
    """

    def codegen(context, builder, signature, args):
        e = _Emitter(context, builder, rows, vector_step(_itemsize(rows)))
        address, first, target, r, c, distance = args
        pointer = builder.gep(builder.inttoptr(address, e.scalar.as_pointer()), [first])
        e.prefetch(builder.gep(pointer, [distance]))
        e.store(e.load(pointer), e.at(rows, target, r, c))
        return context.get_dummy_value()

    integer = types.intp
    return types.void(integer, integer, rows, integer, integer, integer), codegen


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
def address_of(typingctx, array):
    """The address of its first number."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(_Emitter(context, builder, array, 1).at(array, args[0], *[0] * array.ndim), _INT)

    return types.intp(array), codegen


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
