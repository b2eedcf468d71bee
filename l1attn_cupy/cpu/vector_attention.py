"""The inner loops of attention that `vector` does not have: matrix products and the softmax, as LLVM vector code.

A *tile* has one row for each row of y and one lane for each row of x, a panel of them; x is what a task owns. So sums
and maxima over y are sums of vectors, and no loop ever reduces across the lanes of one.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..functions import DISTANCE, INVERSE, LAPLACIAN
from .vector import (
    _INT,
    SUM_UNROLL,
    _Emitter,
    _inverse,
    _itemsize,
    _row_groups,
    _set_or_add,
    _term,
    has_32_registers,
    lanes,
    panel_width,
    scatter_rows,
    sum_rows,
)

_INTEGER = types.intp

#: Channels in one run of sums. Few, as the softmax turns the absolute error of a score into a relative one.
CHANNELS_PER_SUM = 16

#: Weights that `softmax_step` adds together before it adds them to the others; divides the rows of a tile.
_GROUP = 8


class _ExpConstants(NamedTuple):
    """``magic`` rounds to an integer when added; ln 2 is split so that a multiple of its first part is exact."""

    magic: float
    ln2: tuple[float, float]
    degree: int
    lowest: float
    highest: float


_EXP = {
    4: _ExpConstants(1.5 * 2.0**23, (0.693359375, -2.12194440e-4), 7, -126 * math.log(2), 128 * math.log(2)),
    8: _ExpConstants(
        1.5 * 2.0**52, (0.69314718036912381649, 1.90821492927058770002e-10), 13, -1022 * math.log(2), 1024 * math.log(2)
    ),
}


class _AttentionEmitter(_Emitter):
    """With the arithmetic of the softmax."""

    def constant(self, number: float):
        return ir.Constant(self.vector, [number] * self.width)

    def larger(self, a, b):
        """The maximum; of a number and NaN, either."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def tree(self, vectors, combine):
        """All of them combined, in pairs."""
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=False)
            vectors = [combine(a, b) for a, b in pairs] + vectors[len(vectors) // 2 * 2 :]
        return vectors[0]

    def exp(self, x):
        """``e**x``, at most 1.1 ulp off where that is a normal number; 0 below, infinity above, NaN for NaN."""
        high = self.builder.fcmp_ordered(">", x, self.constant(_EXP[self.itemsize].highest))
        return self.builder.select(high, self.constant(math.inf), self.bounded_exp(x))

    def bounded_exp(self, x):
        """The same where the result is no larger than the largest number.

        x = n ln 2 + r with |r| <= ln 2 / 2, e**r by its Taylor polynomial, 2**n by its bits.
        """
        builder, constants = self.builder, _EXP[self.itemsize]
        integers = ir.VectorType(ir.IntType(8 * self.itemsize), self.width)
        mantissa, bias = (23, 127) if self.itemsize == 4 else (52, 1023)
        magic = self.constant(constants.magic)
        shifted = self.multiply_add(x, self.constant(1 / math.log(2)), magic)
        n = builder.fsub(shifted, magic)
        r = x
        for part in constants.ln2:
            r = self.multiply_add(n, self.constant(-part), r)
        tail = self.constant(1 / math.factorial(constants.degree))
        for power in range(constants.degree - 1, 1, -1):
            tail = self.multiply_add(tail, r, self.constant(1 / math.factorial(power)))
        polynomial = builder.fadd(self.constant(1.0), self.multiply_add(builder.fmul(r, r), tail, r))
        exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [mantissa] * self.width))
        power_of_2 = builder.add(exponent, ir.Constant(integers, [bias << mantissa] * self.width))
        result = builder.fmul(polynomial, builder.bitcast(power_of_2, self.vector))
        low = builder.fcmp_ordered("<", x, self.constant(constants.lowest))
        return builder.select(low, self.constant(0.0), result)


def _inverse_row(e, place, args):
    """F of a vector of distances, where it lies: the default score."""
    _, scale, eps = args
    e.store(_inverse(e, e.load(place), scale, eps), place)


def _other_row(e, place, args):
    """Of the other scores."""
    builder, distance = e.builder, e.load(place)
    f, scale, _ = args
    negative = builder.icmp_signed("!=", f, _INT(DISTANCE))
    signed = e.broadcast(builder.select(negative, builder.fneg(scale), scale))
    product = builder.fmul(signed, distance)
    with builder.if_else(builder.icmp_signed("==", f, _INT(LAPLACIAN))) as (laplacian, linear):
        with laplacian:
            e.store(e.exp(product), place)
        with linear:
            e.store(product, place)


def _rows_at_once(itemsize: int) -> int:
    """Rows of a panel whose distances are summed at once: so many that 8 registers are enough for a run of channels.

    That hides the latency of an addition, and where there are 32 registers, the sums of the runs stay in others.
    """
    return 8 * lanes(itemsize) // panel_width(itemsize)


def _sum_beside(e, term, count, rows, aside):
    """Sums of ``count`` channels, up to `CHANNELS_PER_SUM`, for some rows; meanwhile ``aside(r)`` of as many rows r."""
    builder, turns = e.builder, CHANNELS_PER_SUM // SUM_UNROLL
    each, sum_step = rows // turns, e.unrolled(term, SUM_UNROLL)

    def one(row, sums):
        aside(row)
        return sums

    def both(channel, sums):
        return sum_step(channel, e.unrolled(one, each)(builder.udiv(channel, _INT(SUM_UNROLL // each)), sums))

    whole = builder.and_(count, _INT(-SUM_UNROLL))
    sums = e.loop(_INT(0), whole, e.zeros(rows), both, SUM_UNROLL)
    sums = e.loop(whole, count, sums, term)
    e.loop(builder.udiv(whole, _INT(SUM_UNROLL // each)), _INT(rows), [], one)
    return sums


def _smaller(e, a, b):
    return e.builder.select(e.builder.icmp_signed("<", a, b), a, b)


def _store_sums(e, term, n, totals, places):
    """Store ``totals``, the sums of the first run of channels, plus those of the other runs."""
    builder, most = e.builder, _INT(CHANNELS_PER_SUM)

    def store(vectors):
        for place, vector in zip(places, vectors, strict=True):
            e.store(vector, place)

    def run(first):
        count = _smaller(e, builder.sub(n, first), most)
        whole = builder.add(first, builder.and_(count, _INT(-SUM_UNROLL)))
        sums = e.loop(first, whole, e.zeros(len(places)), e.unrolled(term, SUM_UNROLL), SUM_UNROLL)
        return e.loop(whole, builder.add(first, count), sums, term)

    def add(first, totals):
        return [builder.fadd(total, part) for total, part in zip(totals, run(first), strict=True)]

    def add_in_memory(first, _):
        sums = run(first)
        store([builder.fadd(e.load(place), part) for place, part in zip(places, sums, strict=True)])
        return []

    runs = builder.udiv(builder.add(n, _INT(CHANNELS_PER_SUM - 1)), most)
    end = builder.select(builder.icmp_signed(">", n, most), builder.mul(runs, most), most)
    if has_32_registers():
        store(e.loop(most, end, totals, add, CHANNELS_PER_SUM))
    else:
        store(totals)
        e.loop(most, end, [], add_in_memory, CHANNELS_PER_SUM)


@intrinsic
def score_panels(typingctx, y_panels, count, x_panels, x_index, channels, tile, score, scale, eps):
    """Scores of ``count`` panels of y and one of x: ``tile[r, c] = F(sum_e |y[r, e] - x[c, e]|)``, c < panel width.

    Sums are of `CHANNELS_PER_SUM` channels each, then of these. F of a few rows is computed while the next are summed:
    on their own, divisions would hold up everything else.
    """

    def codegen(context, builder, signature, args):
        e = _AttentionEmitter(context, builder, tile, panel_width(_itemsize(tile)))
        y, panels, x, x_at, n, out, *f = args
        rows = _rows_at_once(e.itemsize)

        def all_rows(score_row):
            def score_after(first, row):
                score_row(e, e.at(tile, out, builder.add(first, row), 0), f)

            with (
                cgutils.for_range_slice(builder, _INT(0), panels, _INT(1)) as (panel, _),
                cgutils.for_range_slice(builder, _INT(0), _INT(e.width), _INT(rows)) as (top, _),
            ):
                row = builder.add(builder.mul(panel, _INT(e.width)), top)
                # Before the first rows there are none: what is there is scored, and then overwritten.
                before = builder.select(builder.icmp_signed("==", row, _INT(0)), row, builder.sub(row, _INT(rows)))
                term = _term(e, y_panels, x_panels, (y, panel, x, x_at, _INT(0), top))
                head = _smaller(e, n, _INT(CHANNELS_PER_SUM))
                totals = _sum_beside(e, term, head, rows, functools.partial(score_after, before))
                _store_sums(e, term, n, totals, [e.at(tile, out, builder.add(row, _INT(r)), 0) for r in range(rows)])
            last = builder.sub(builder.mul(panels, _INT(e.width)), _INT(rows))
            for r in range(rows):
                score_after(last, _INT(r))

        with builder.if_else(builder.icmp_signed("==", f[0], _INT(INVERSE))) as (inverse, others):
            with inverse:
                all_rows(_inverse_row)
            with others:
                all_rows(_other_row)
        return context.get_dummy_value()

    integer, number = _INTEGER, tile.dtype
    return types.void(y_panels, integer, x_panels, integer, integer, tile, integer, number, number), codegen


@intrinsic
def sum_products(typingctx, a_panels, a_index, b_panels, b_index, first, count, tile, row):
    """``tile[row + r, c] += sum_e a_panels[a_index, e, r] * b_panels[b_index, e, c]``, r and c < panel width.

    e runs from ``first``, upwards, over ``count`` channels. With ``first == 0`` the tile is set, not added to.
    """

    def codegen(context, builder, signature, args):
        e = _AttentionEmitter(context, builder, a_panels, panel_width(_itemsize(a_panels)))
        a, a_at, b, b_at, start, n, out, top = args

        def step(first_row, i, sums):
            channel = builder.add(start, i)
            columns = e.load(e.at(b_panels, b, b_at, channel, 0))
            numbers = [builder.add(first_row, _INT(r)) for r in range(len(sums))]
            rows = [e.splat(e.at(a_panels, a, a_at, channel, r)) for r in numbers]
            return [e.multiply_add(row, columns, total) for row, total in zip(rows, sums, strict=True)]

        with _row_groups(e) as first_row:
            totals = e.accumulate(n, sum_rows(e.itemsize), functools.partial(step, first_row), unroll=4)
            place = builder.add(top, first_row)
            places = [e.at(tile, out, builder.add(place, _INT(r)), 0) for r in range(len(totals))]
            _set_or_add(e, start, totals, places)
        return context.get_dummy_value()

    signature = types.void(a_panels, _INTEGER, b_panels, _INTEGER, _INTEGER, _INTEGER, tile, _INTEGER)
    return signature, codegen


def _weighted_rows(vectors: int) -> Any:
    def add(typingctx, weights, lane, rows, count, channel, factors, out, row):
        def codegen(context, builder, signature, args):
            n_rows, step_width = scatter_rows(_itemsize(rows)), lanes(_itemsize(rows))
            e = _AttentionEmitter(context, builder, rows, step_width)
            w, first_lane, y, n, chan, factor, target, first_row = args
            places = [builder.add(chan, _INT(v * step_width)) for v in range(vectors)]

            def step(j, sums):
                values = [e.load(e.at(rows, y, j, place)) for place in places]
                updated = []
                for r in range(n_rows):
                    weight = e.splat(e.at(weights, w, j, builder.add(first_lane, _INT(r))))
                    old = sums[r * vectors : (r + 1) * vectors]
                    updated += [e.multiply_add(weight, value, total) for value, total in zip(values, old, strict=True)]
                return updated

            totals = e.accumulate(n, n_rows * vectors, step, unroll=2)
            for r in range(n_rows):
                at = builder.add(first_row, _INT(r))
                rescale = e.splat(e.at(factors, factor, builder.add(first_lane, _INT(r))))
                for place, total in zip(places, totals[r * vectors :], strict=False):
                    pointer = e.at(out, target, at, place)
                    e.store(e.multiply_add(rescale, e.load(pointer), total), pointer)
            return context.get_dummy_value()

        signature = types.void(weights, _INTEGER, rows, _INTEGER, _INTEGER, factors, out, _INTEGER)
        return signature, codegen

    return intrinsic(add)


#: ``add_weighted_rows(weights, lane, rows, count, channel, factors, out, row)``::
#:
#:     out[row + r, c] = factors[lane + r] * out[row + r, c] + sum_j weights[j, lane + r] * rows[j, c],   j < count
#:
#: r runs over `scatter_rows`, c over 2 `lanes` channels from ``channel`` on.
add_weighted_rows = _weighted_rows(2)

#: The same for `lanes` channels.
add_weighted_rows_1 = _weighted_rows(1)


@intrinsic
def softmax_step(typingctx, tile, count, largest, total, factors, first):
    """One step of the online softmax: replace the scores of ``count`` rows of y by ``exp(score - maximum)``. Further
    rows, up to a multiple of `_GROUP`, become 0.

    ``largest`` and ``total`` hold the maximum and the sum so far of each row of x, from ``first`` on; they are updated.
    ``factors[:width]`` becomes what everything that was summed before is to be multiplied by. A maximum of -inf, of
    rows that have no key so far, gives weights of 0.
    """

    def codegen(context, builder, signature, args):
        width = panel_width(_itemsize(tile))
        e = _AttentionEmitter(context, builder, tile, width)
        scores, n, most, sums, factor, start = args
        before = e.load(e.at(largest, most, start))
        groups = builder.and_(builder.add(n, _INT(_GROUP - 1)), _INT(-_GROUP))
        with cgutils.for_range_slice(builder, n, groups, _INT(1)) as (j, _):
            e.store(e.constant(-math.inf), e.at(tile, scores, j, 0))
        best = cgutils.alloca_once_value(builder, before)
        with cgutils.for_range_slice(builder, _INT(0), groups, _INT(_GROUP)) as (j, _):
            group = [e.load(e.at(tile, scores, builder.add(j, _INT(r)), 0)) for r in range(_GROUP)]
            builder.store(e.tree([*group, builder.load(best)], e.larger), best)
        maximum = builder.load(best)
        none = builder.fcmp_ordered("==", maximum, e.constant(-math.inf))
        subtracted = builder.select(none, e.constant(0.0), maximum)
        rescale = e.bounded_exp(builder.fsub(before, subtracted))
        # Weights are added in groups: one by one, each would be rounded to the last digit of their sum.
        weights = cgutils.alloca_once_value(builder, e.constant(0.0))
        with cgutils.for_range_slice(builder, _INT(0), groups, _INT(_GROUP)) as (j, _):
            group = []
            for r in range(_GROUP):
                place = e.at(tile, scores, builder.add(j, _INT(r)), 0)
                group.append(e.bounded_exp(builder.fsub(e.load(place), subtracted)))
                e.store(group[-1], place)
            builder.store(builder.fadd(builder.load(weights), e.tree(group, builder.fadd)), weights)
        place = e.at(total, sums, start)
        e.store(e.multiply_add(rescale, e.load(place), builder.load(weights)), place)
        e.store(maximum, e.at(largest, most, start))
        e.store(rescale, e.at(factors, factor, 0))
        return context.get_dummy_value()

    return types.void(tile, _INTEGER, largest, total, factors, _INTEGER), codegen


@intrinsic
def softmax_backward_step(typingctx, masked, scores, products, count, statistics, first, by_row):
    """Weights, and the gradients of the scores, of ``count`` rows of y, in place::

        masked    scores with the mask added           becomes  p = exp(masked - statistics[0]) * statistics[1]
        products  the gradient of p                    becomes  p * (products - statistics[2])
        scores    scores without the mask              becomes  0 where masked is -inf

    ``statistics`` belong to the rows of y if ``by_row``, otherwise to those of x from ``first`` on. Where masked is
    -inf all become 0: a key that is ruled out may hold NaN. Further rows of weights, up to a multiple of `_GROUP`,
    become 0.
    """

    def codegen(context, builder, signature, args):
        width = panel_width(_itemsize(masked))
        e = _AttentionEmitter(context, builder, masked, width)
        w_at, s_at, p_at, n, stats_at, start, rows = args
        zero = e.constant(0.0)

        def one_row(j, largest, factor, offset):
            places = [e.at(kind, at, j, 0) for kind, at in ((masked, w_at), (scores, s_at), (products, p_at))]
            weighted, score, product = (e.load(place) for place in places)
            weight = builder.fmul(e.exp(builder.fsub(weighted, largest)), factor)
            gradient = builder.fmul(weight, builder.fsub(product, offset))
            nothing = builder.fcmp_ordered("==", weighted, e.constant(-math.inf))
            for result, place in zip((weight, score, gradient), places, strict=True):
                e.store(builder.select(nothing, zero, result), place)

        with builder.if_else(rows) as (of_y, of_x):
            with of_y, cgutils.for_range(builder, n) as loop:
                j = loop.index
                one_row(j, *(e.splat(e.at(statistics, stats_at, which, j)) for which in range(3)))
            with of_x:
                own = [e.load(e.at(statistics, stats_at, which, start)) for which in range(3)]
                with cgutils.for_range(builder, n) as loop:
                    one_row(loop.index, *own)
        groups = builder.and_(builder.add(n, _INT(_GROUP - 1)), _INT(-_GROUP))
        with cgutils.for_range_slice(builder, n, groups, _INT(1)) as (j, _):
            e.store(zero, e.at(masked, w_at, j, 0))
        return context.get_dummy_value()

    signature = types.void(masked, scores, products, _INTEGER, statistics, _INTEGER, types.boolean)
    return signature, codegen
