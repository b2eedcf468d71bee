"""Fused L1 attention on the CPU, forward: ``softmax(F(distance) + mask) @ value`` without the matrix of scores.

A task is a block of queries of one batch entry against a range of keys. It walks over tiles of `Y_ROWS` keys with an
online softmax: for each panel of queries the scores of a tile, their maximum and weights, and the weighted sum of the
values are all computed while the tile is in the L1 cache. Tiles that a window or causality rules out are skipped.

Where there are few queries, as in decoding, the keys are split among tasks; `merge` joins the parts.

What is here beside the forward pass serves the backward pass too. There x, the rows that a task owns, may be keys.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..functions import NEGATIVE
from .elements import aligned_empty, load_rows, store_rows
from .jit import kernel
from .panels import load_panels, new_panels, score_panels
from .scores import _address, _blocks, padded_channels
from .vector import all_finite, lanes, panel_width, peek, poke, scatter_rows
from .vector_attention import add_weighted_rows, add_weighted_rows_1, softmax_step

#: Rows of y in a tile.
Y_ROWS = 32

#: Kinds of mask.
NO_MASK, BOOLEAN, ADDITIVE = range(3)

#: What stands for a score that is -inf by itself, of a key infinitely far away: -inf says that a key is ruled out, and
#: nothing else. No other score comes to it: a mask of the lowest number there is, its neighbour, swallows what it is
#: added to.
_FARTHEST4, _FARTHEST8 = (-float(np.nextafter(np.finfo(t).max, 0)) for t in (np.float32, np.float64))

_WIDTH4, _WIDTH8 = panel_width(4), panel_width(8)
_ROWS4, _ROWS8 = scatter_rows(4), scatter_rows(8)
_LANES4, _LANES8 = lanes(4), lanes(8)


@kernel()
def task_of(turn, run, runs):
    """The task that a run does in a turn: there and back, so that runs share tasks of falling cost evenly."""
    return turn * runs + (run if turn % 2 == 0 else runs - 1 - run)


@kernel(forceinline=True)
def score_tile(y_panels, y_count, x_panels, panel, channels, tile, score, scale, eps):
    """Scores of y (the rows of the tile, ``y_count`` times as many as it has lanes) and of x (its lanes)."""
    score_panels(y_panels, y_count, x_panels, panel, channels, tile, score, scale, eps)
    if score == NEGATIVE:
        _bound(tile[: y_count * tile.shape[1]])


@kernel()
def _bound(tile):
    """Make -inf the farthest score."""
    farthest = tile.dtype.type(_FARTHEST4 if tile.itemsize == 4 else _FARTHEST8)
    flat = tile.ravel()
    for i in range(flat.size):
        flat[i] = farthest if flat[i] == -np.inf else flat[i]


@kernel(forceinline=True)
def outside_band(difference, x_count, y_count, band):
    """Whether no x - y of a tile lies in the band; ``difference`` is that of its first row and lane."""
    return difference + x_count - 1 < band[0] or difference - (y_count - 1) > band[1]


@kernel(forceinline=True)
def exclude(tile, difference, x_count, y_count, band):
    """Set the scores outside the band to -inf."""
    if difference - (y_count - 1) >= band[0] and difference + x_count - 1 <= band[1]:
        return
    for j in range(y_count):
        for c in range(x_count):
            d = difference + c - j
            if d < band[0] or d > band[1]:
                tile[j, c] = -np.inf


@kernel()
def add_mask(source, kind, dtype, mask, x_count, y_count, loaded, tile):
    """Add the mask, whose part for this tile is at ``source``. A score that is masked by False or -inf becomes -inf."""
    if kind == BOOLEAN:
        for j in range(y_count):
            for c in range(x_count):
                if peek(source, j * mask.column + c * mask.row, np.uint8(0)) == 0:
                    tile[j, c] = -np.inf
    elif kind == ADDITIVE:
        load_rows(source, dtype, mask.column, mask.row, y_count, x_count, loaded)
        farthest = tile.dtype.type(_FARTHEST4 if tile.itemsize == 4 else _FARTHEST8)
        for j in range(y_count):
            for c in range(x_count):
                total = tile[j, c] + loaded[j, c]
                tile[j, c] = loaded[j, c] if loaded[j, c] == -np.inf else farthest if total == -np.inf else total


@kernel()
def set_aside(rows, count, special):
    """Move what is infinite or NaN from ``rows`` to ``special``, and return whether there is any.

    Keys that are ruled out must make nothing of it: their values may be anything.
    """
    if all_finite(rows, count):
        return False
    zero = rows.dtype.type(0)
    for j in range(count):
        for c in range(rows.shape[1]):
            value = rows[j, c]
            finite = (value - value) == 0
            special[j, c] = zero if finite else value
            rows[j, c] = value if finite else zero
    return True


@kernel(forceinline=True)
def add_weighted(weights, rows, special, scores, has_special, count, factors, out, first, x_count):
    """``out[first + r] = factors[r] * out[first + r] + sum_j weights[j, r] * rows[j]`` for the lanes r of a panel.

    If ``has_special``, also of ``special``, but where ``scores`` is -inf.
    """
    group, step = (_ROWS4, _LANES4) if rows.itemsize == 4 else (_ROWS8, _LANES8)
    pairs = rows.shape[1] // (2 * step) * (2 * step)
    for r in range(0, x_count, group):
        for c in range(0, pairs, 2 * step):
            add_weighted_rows(weights, r, rows, count, c, factors, out, first + r)
        for c in range(pairs, rows.shape[1], step):
            add_weighted_rows_1(weights, r, rows, count, c, factors, out, first + r)
    if has_special:
        for r in range(x_count):
            for j in range(count):
                if scores[j, r] != -np.inf:
                    for c in range(rows.shape[1]):
                        out[first + r, c] += weights[j, r] * special[j, c] if special[j, c] != 0 else rows.dtype.type(0)


@kernel()
def _finish(acc, largest, total, rows, whole, softmax, stride):
    """Divide by the sum of the weights, and write softmax; rows without a key become 0.

    Rows whose keys are all infinitely far away become NaN, unless more keys may come, in another part.
    """
    one, zero = acc.dtype.type(1), acc.dtype.type(0)
    farthest = acc.dtype.type(_FARTHEST4 if acc.itemsize == 4 else _FARTHEST8)
    for r in range(rows):
        if whole and largest[r] == farthest:
            largest[r] = total[r] = np.nan
        poke(softmax, r * stride, largest[r])
        poke(softmax, r * stride + 1, total[r])
        factor = zero if total[r] == 0 else one / total[r]
        for c in range(acc.shape[1]):
            acc[r, c] *= factor


def _forward(q, k, v, mask, quant_scale, out, softmax, dtypes, batch, sizes, work, blocks, band, score, scalars, like):
    """out and softmax of every batch entry.

    ``dtypes`` is (code and itemsize of the arrays and of out, itemsize of softmax, kind of mask, code and itemsize of q
    and k); ``like`` is of the type of their panels. Distances of bytes are multiplied by the ``quant_scale`` of their
    entry too, unless that has address 0. ``sizes`` is
    (batches, E, Ev), ``blocks`` is (most queries in a task, stride of out and of softmax between parts of the keys or 0
    if there is one part, runs). A line of ``work``
    is (first query, queries, first key, end of the keys, what to add to query - key to get the difference of their
    places in their sequences, part); ``band`` has the least and the largest such difference that is not ruled out;
    ``scalars`` is (scale, eps).
    """
    dtype, itemsize, out_dtype, out_itemsize, softmax_itemsize, kind, qk_dtype, qk_itemsize = dtypes
    batches, channels, channels_v = sizes
    q_block, out_part, softmax_part, runs = blocks
    tasks = work.shape[0] * batches
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded, padded_v = padded_channels(channels, scalars), padded_channels(channels_v, scalars)
    mask_itemsize = 1 if kind == BOOLEAN else itemsize
    for run in prange(runs):
        scratch = aligned_empty((width, padded), scalars)
        q_panels, k_panels = new_panels(q_block, channels, True, like), new_panels(Y_ROWS, channels, False, like)
        values, special = aligned_empty((Y_ROWS, padded_v), scalars), aligned_empty((Y_ROWS, padded_v), scalars)
        tile, loaded = aligned_empty((Y_ROWS, width), scalars), aligned_empty((Y_ROWS, width), scalars)
        before = aligned_empty((Y_ROWS, width), scalars)
        acc, half = aligned_empty((q_block, padded_v), scalars), np.empty((q_block, padded_v), np.uint16)
        largest, total = aligned_empty((q_block,), scalars), aligned_empty((q_block,), scalars)
        factors = aligned_empty((width,), scalars)
        for turn in range(_blocks(tasks, runs)):
            task = task_of(turn, np.int64(run), runs)
            if task >= tasks:
                continue
            block, index = work[task // batches], task % batches
            i0, rows, j_first, j_end, offset, part = block[0], block[1], block[2], block[3], block[4], block[5]
            source = _address(q, qk_itemsize, index, batch, i0, 0)
            load_panels(source, qk_dtype, qk_itemsize, q, rows, channels, scratch, q_panels)
            scale = scalars[0]
            if quant_scale.data != 0:
                scale *= peek(_address(quant_scale, 4, index, batch, 0, 0), 0, np.float32(0))
            acc[:], total[:], largest[:] = 0, 0, -np.inf
            for j0 in range(j_first, j_end, Y_ROWS):
                columns = min(Y_ROWS, j_end - j0)
                source = _address(k, qk_itemsize, index, batch, j0, 0)
                load_panels(source, qk_dtype, qk_itemsize, k, columns, channels, scratch, k_panels)
                source = _address(v, itemsize, index, batch, j0, 0)
                load_rows(source, dtype, v.row, v.column, columns, channels_v, values)
                has_special = set_aside(values, columns, special)
                for p in range(_blocks(rows, width)):
                    i, count = i0 + p * width, min(width, rows - p * width)
                    if outside_band(i - j0 + offset, count, columns, band):
                        continue
                    y_count = _blocks(columns, width)
                    score_tile(k_panels, y_count, q_panels, p, channels, tile, score, scale, scalars[1])
                    if kind != NO_MASK:
                        source = _address(mask, mask_itemsize, index, batch, i, j0)
                        add_mask(source, kind, dtype, mask, count, columns, loaded, tile)
                    exclude(tile, i - j0 + offset, count, columns, band)
                    if has_special:
                        before[:] = tile
                    softmax_step(tile, columns, largest, total, factors, p * width)
                    add_weighted(tile, values, special, before, has_special, columns, factors, acc, p * width, count)
            place = _address(softmax, softmax_itemsize, index, batch, i0, 0) + part * softmax_part * softmax_itemsize
            _finish(acc, largest, total, rows, softmax_part == 0, place, softmax.row)
            place = _address(out, out_itemsize, index, batch, i0, 0) + part * out_part * out_itemsize
            store_rows(acc, half, rows, channels_v, place, out_dtype, out.row, out.column)


@kernel()
def merge(out, softmax, dtypes, batch, parts, part_softmax):
    """Join attention to several parts of the keys: their mean, weighted by the sums of their weights.

    ``parts`` is (parts, batches, L, Ev), ``part_softmax`` is (parts, batches, L, 2).
    """
    dtype, itemsize, softmax_itemsize = dtypes
    n, batches, length, channels = parts.shape
    row, half = np.empty((1, channels), parts.dtype), np.empty((1, channels), np.uint16)
    most, sums = np.empty(1, parts.dtype), np.empty(1, parts.dtype)
    for index in range(batches):
        for i in range(length):
            own = part_softmax[:, index, i]
            most[0], sums[0], row[:] = own[:, 0].max(), 0, 0
            for part in range(n):
                if own[part, 0] != -np.inf:
                    weight = np.exp(own[part, 0] - most[0]) * own[part, 1]
                    sums[0] += weight
                    for c in range(channels):
                        row[0, c] += weight * parts[part, index, i, c]
            place = _address(softmax, softmax_itemsize, index, batch, i, 0)
            _finish(row, most, sums, 1, True, place, softmax.row)
            place = _address(out, itemsize, index, batch, i, 0)
            store_rows(row, half, 1, channels, place, dtype, out.row, out.column)


forward = kernel(parallel=True)(_forward)
forward_serial = kernel()(_forward)
