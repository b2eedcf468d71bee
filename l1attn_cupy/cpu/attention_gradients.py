"""Gradients of fused L1 attention on the CPU, from query, key, value, out, and largest and total of the softmax::

    p[i, j]   = exp(score[i, j] - largest[i]) / total[i]
    delta[i]  = sum_c grad[i, c] * out[i, c] - grad_lse[i]
    ds[i, j]  = p[i, j] * (sum_c grad[i, c] * value[j, c] - delta[i])          gradient of the score and of the mask
    h         = ds * F'(x) * scale
    dquery[i] = sum_j h[i, j] * sign(query[i] - key[j]),   dkey[j] = sum_i h[i, j] * sign(key[j] - query[i])
    dvalue[j] = sum_i p[i, j] * grad[i]

`backward` computes dquery, or dkey and dvalue: a task owns a block of rows of x, query or key, and walks over tiles of
y, the other one, in a fixed order. Scores, weights and ds exist one tile at a time. What belongs to x and y as value
does to key is xv and yv: for queries that is the gradient of out.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .attention import (
    BOOLEAN,
    NO_MASK,
    Y_ROWS,
    add_mask,
    add_weighted,
    exclude,
    outside_band,
    score_tile,
    set_aside,
    task_of,
)
from .elements import aligned_empty, apply_derivative, load_rows, store_rows
from .jit import kernel
from .scores import _address, _blocks, _load_panels, _scatter_any, add, clear, padded_channels
from .vector import lanes, pack, panel_width, peek, poke, scatter_rows, sign_scatter, sign_scatter_both
from .vector_attention import CHANNELS_PER_SUM, softmax_backward_step, sum_products

_WIDTH4, _WIDTH8 = panel_width(4), panel_width(8)
_ROWS4, _ROWS8 = scatter_rows(4), scatter_rows(8)
_LANES4, _LANES8 = lanes(4), lanes(8)


def _delta(grad, out, grad_lse, delta, dtypes, batch, sizes, runs, like):
    """``delta[i] = sum_c grad[i, c] * out[i, c] - grad_lse[i]``; ``like`` is of the type of delta.

    Summed as `_product_tile` does: where one key has all the weight, out is its value, and the gradient of the score,
    a difference of such sums, is exactly 0.
    """
    dtype, itemsize, out_dtype, out_itemsize, sum_itemsize, lse_itemsize = dtypes
    batches, length, channels = sizes
    width = _WIDTH4 if like.itemsize == 4 else _WIDTH8
    blocks, padded = _blocks(length, width), padded_channels(channels, like)
    tasks = batches * blocks
    for run in prange(runs):
        scratch, tile = aligned_empty((width, padded), like), aligned_empty((width, width), like)
        a, b = aligned_empty((1, padded, width), like), aligned_empty((1, padded, width), like)
        for task in range(tasks * run // runs, tasks * (run + 1) // runs):
            index, i = task // blocks, task % blocks * width
            rows = min(width, length - i)
            source = _address(grad, itemsize, index, batch, i, 0)
            _load_panels(source, dtype, itemsize, grad, rows, channels, scratch, a)
            source = _address(out, out_itemsize, index, batch, i, 0)
            _load_panels(source, out_dtype, out_itemsize, out, rows, channels, scratch, b)
            _product_tile(a, 1, b, 0, channels, tile)
            for r in range(rows):
                total = np.float64(tile[r, r])
                if grad_lse.data != 0:
                    place = _address(grad_lse, lse_itemsize, index, batch, i + r, 0)
                    total -= peek(place, 0, np.float64(0)) if lse_itemsize == 8 else peek(place, 0, np.float32(0))
                poke(_address(delta, sum_itemsize, index, batch, i + r, 0), 0, like.dtype.type(total))


@kernel()
def _load_softmax(softmax, delta, itemsize, index, batch, first, count, rows):
    """``rows[:, r]``: largest, one over total, and delta, of ``count`` queries; 0 for others."""
    rows[:] = 0
    one = rows.dtype.type(1)
    for r in range(count):
        place = _address(softmax, itemsize, index, batch, first + r, 0)
        rows[0, r], rows[1, r] = peek(place, 0, one), one / peek(place, 1, one)
        rows[2, r] = peek(_address(delta, itemsize, index, batch, first + r, 0), 0, one)


@kernel()
def _load_both(source, dtype, matrix, count, channels, rows, panels):
    """Rows as they are, and as panels."""
    load_rows(source, dtype, matrix.row, matrix.column, count, channels, rows)
    width = panels.shape[2]
    for p in range(_blocks(count, width)):
        pack(rows, p * width, rows.shape[1], panels, p)


@kernel()
def _product_tile(y_panels, y_count, x_panels, panel, channels, tile):
    """Products of ``y_count`` panels of y (the rows of the tile) and one panel of x (its lanes)."""
    width = tile.shape[1]
    for p in range(y_count):
        sum_products(y_panels, p, x_panels, panel, 0, min(CHANNELS_PER_SUM, channels), tile, p * width)
        for first in range(CHANNELS_PER_SUM, channels, CHANNELS_PER_SUM):
            count = min(CHANNELS_PER_SUM, channels - first)
            sum_products(y_panels, p, x_panels, panel, first, count, tile, p * width)


@kernel()
def _masked_scores(source, mask, kind, dtype, scores, difference, x_count, y_count, band, loaded, masked):
    """The scores of a tile with everything that rules keys out; lanes beyond ``x_count`` are ruled out too."""
    masked[:y_count] = scores[:y_count]
    if kind != NO_MASK:
        add_mask(source, kind, dtype, mask, x_count, y_count, loaded, masked)
    exclude(masked, difference, x_count, y_count, band)
    if x_count < masked.shape[1]:
        for j in range(y_count):
            masked[j, x_count:] = -np.inf


@kernel()
def _scatter_any_back(x, y, h, x_count, y_count, dy):
    """The sums for y of `sign_scatter_both` for any h, in the same order: rows without NaN keep their bits."""
    zero = x.dtype.type(0)
    for j in range(y_count):
        for e in range(x.shape[1]):
            for c in range(x_count):
                if x[c, e] > y[j, e]:
                    dy[j, e] -= h[j, c]
                elif x[c, e] < y[j, e]:
                    dy[j, e] += h[j, c]
                else:
                    dy[j, e] += h[j, c] * zero


@kernel()
def _scatter(x, first, y, h, x_count, y_count, finite, dx, dy):
    """``dx[first + c] += sum_j h[0, j, c] * sign(x[first + c] - y[j])`` for the lanes c of a panel.

    If dy is not empty, also ``dy[j] += sum_c h[0, j, c] * sign(y[j] - x[first + c])``.
    """
    both = dy.shape[0] > 0
    if not finite:
        _scatter_any(x[first:], y, h[0], False, x_count, y_count, dx[first:])
        if both:
            _scatter_any_back(x[first:], y, h[0], x_count, y_count, dy)
        return
    rows, step = (_ROWS4, _LANES4) if x.itemsize == 4 else (_ROWS8, _LANES8)
    for channel in range(0, x.shape[1], step):
        for c in range(0, x_count, rows):
            if both:
                sign_scatter_both(x, first + c, y, h, c, y_count, channel, dx, dy)
            else:
                sign_scatter(x, first + c, y, h, 0, c, y_count, channel, dx)


def _backward(
    x, xv, y, yv, softmax, delta, mask, dx, dxv, dtypes, batch, sizes, work, blocks, band, score, scalars, parts
):
    """dx and dxv, those whose address is not 0, summed also over the batch entries that share a row of x.

    ``dtypes`` is (code and itemsize of the arrays, itemsize of softmax, kind of mask), ``sizes`` is (batches of dx,
    batches summed into each, E, Ev), ``blocks`` is (most rows of x in a task, whether x is key, runs); ``work``,
    ``band`` and ``scalars`` are as in `attention.forward`, with x for the queries.

    ``parts``, (parts, batches, rows of y, E padded), are for dy, to which each adds what its share of the lines of
    ``work`` gives, line by line; they are zeros. Without parts dy is left out.
    """
    dtype, itemsize, sum_itemsize, kind = dtypes
    kept, summed, channels, channels_v = sizes
    x_block, of_key, runs = blocks
    groups = parts.shape[0] if parts.shape[0] > 0 else work.shape[0]
    lines = _blocks(work.shape[0], groups)
    tasks = groups * kept
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded, padded_v = padded_channels(channels, scalars), padded_channels(channels_v, scalars)
    mask_itemsize = 1 if kind == BOOLEAN else itemsize
    y_most = Y_ROWS if parts.size > 0 else 0
    for run in prange(runs):
        x_rows, dx_rows = aligned_empty((x_block, padded), scalars), aligned_empty((x_block, padded), scalars)
        xv_rows, dxv_rows = aligned_empty((x_block, padded_v), scalars), aligned_empty((x_block, padded_v), scalars)
        y_rows, yv_rows = aligned_empty((Y_ROWS, padded), scalars), aligned_empty((Y_ROWS, padded_v), scalars)
        special, dy_rows = aligned_empty((Y_ROWS, padded_v), scalars), aligned_empty((y_most, padded), scalars)
        x_panels = aligned_empty((x_block // width, padded, width), scalars)
        xv_panels = aligned_empty((x_block // width, padded_v, width), scalars)
        y_panels = aligned_empty((Y_ROWS // width, padded, width), scalars)
        yv_panels = aligned_empty((Y_ROWS // width, padded_v, width), scalars)
        scores, masked = aligned_empty((Y_ROWS, width), scalars), aligned_empty((Y_ROWS, width), scalars)
        h, loaded = aligned_empty((1, Y_ROWS, width), scalars), aligned_empty((Y_ROWS, width), scalars)
        before, statistics = (
            aligned_empty((Y_ROWS, width), scalars),
            aligned_empty((3, max(x_block, Y_ROWS)), scalars),
        )
        half, half_v = np.empty((x_block, padded), np.uint16), np.empty((x_block, padded_v), np.uint16)
        ones = np.ones(width, scalars.dtype)
        for turn in range(_blocks(tasks, runs) * lines):
            task = task_of(turn // lines, np.int64(run), runs)
            line = task_of(turn % lines, task // kept, groups)
            if task >= tasks or line >= work.shape[0]:
                continue
            block, entry = work[line], task % kept
            i0, rows, first, end, place = block[0], block[1], block[2], block[3], block[4]
            dx_rows[:], dxv_rows[:] = 0, 0
            for index in range(entry * summed, (entry + 1) * summed):
                _load_both(_address(x, itemsize, index, batch, i0, 0), dtype, x, rows, channels, x_rows, x_panels)
                source = _address(xv, itemsize, index, batch, i0, 0)
                _load_both(source, dtype, xv, rows, channels_v, xv_rows, xv_panels)
                if not of_key:
                    _load_softmax(softmax, delta, sum_itemsize, index, batch, i0, rows, statistics)
                for j0 in range(first, end, Y_ROWS):
                    columns = min(Y_ROWS, end - j0)
                    source = _address(y, itemsize, index, batch, j0, 0)
                    _load_both(source, dtype, y, columns, channels, y_rows, y_panels)
                    source = _address(yv, itemsize, index, batch, j0, 0)
                    _load_both(source, dtype, yv, columns, channels_v, yv_rows, yv_panels)
                    has_special = set_aside(yv_rows, columns, special)
                    dy_tile = dy_rows[: min(columns, y_most)]
                    clear(dy_tile)
                    if of_key:
                        _load_softmax(softmax, delta, sum_itemsize, index, batch, j0, columns, statistics)
                    for p in range(_blocks(rows, width)):
                        i, count = i0 + p * width, min(width, rows - p * width)
                        if outside_band(i - j0 + place, count, columns, band):
                            continue
                        panels = _blocks(columns, width)
                        score_tile(y_panels, panels, x_panels, p, channels, scores, score, scalars[0], scalars[1])
                        _product_tile(yv_panels, panels, xv_panels, p, channels_v, h[0])
                        source = _address(mask, mask_itemsize, index, batch, i, j0)
                        difference = i - j0 + place
                        _masked_scores(
                            source, mask, kind, dtype, scores, difference, count, columns, band, loaded, masked
                        )
                        if has_special:
                            before[:] = masked
                        softmax_backward_step(masked, scores, h[0], columns, statistics, p * width, of_key)
                        if dxv.data != 0:
                            add_weighted(
                                *(masked, yv_rows, special, before, has_special, columns, ones),
                                *(dxv_rows, p * width, count),
                            )
                        if dx.data != 0:
                            finite = apply_derivative(h[0, :columns], scores[:columns], score, scalars[0])
                            _scatter(x_rows, p * width, y_rows, h, count, columns, finite, dx_rows, dy_tile)
                    if y_most > 0:
                        add(dy_tile, parts[task // kept, entry, j0 : j0 + columns])
            if dx.data != 0:
                target = _address(dx, itemsize, entry * summed, batch, i0, 0)
                store_rows(dx_rows, half, rows, channels, target, dtype, dx.row, dx.column)
            if dxv.data != 0:
                target = _address(dxv, itemsize, entry * summed, batch, i0, 0)
                store_rows(dxv_rows, half_v, rows, channels_v, target, dtype, dxv.row, dxv.column)


def _mask_gradient(
    q, k, v, grad, softmax, delta, mask, dmask, dtypes, batch, sizes, shared, runs, band, score, scalars
):
    """The sum of ds over all that share an element of the mask.

    ``sizes`` is (batches of dmask, batches summed into each, L, S, E, Ev), ``shared`` is (whether all queries share a
    row of the mask, whether all keys share a column). A task has a panel of queries, or all, and a tile of keys, or
    all.
    """
    dtype, itemsize, sum_itemsize, kind = dtypes
    kept, summed, length_q, length_k, channels, channels_v = sizes
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded, padded_v = padded_channels(channels, scalars), padded_channels(channels_v, scalars)
    q_block, k_block = length_q if shared[0] else width, length_k if shared[1] else Y_ROWS
    q_blocks, k_blocks = _blocks(length_q, q_block), _blocks(length_k, k_block)
    tasks = kept * q_blocks * k_blocks
    for run in prange(runs):
        scratch, scratch_v = aligned_empty((width, padded), scalars), aligned_empty((width, padded_v), scalars)
        q_panels, grad_panels = (
            aligned_empty((1, padded, width), scalars),
            aligned_empty((1, padded_v, width), scalars),
        )
        k_panels = aligned_empty((Y_ROWS // width, padded, width), scalars)
        v_panels = aligned_empty((Y_ROWS // width, padded_v, width), scalars)
        scores, masked = aligned_empty((Y_ROWS, width), scalars), aligned_empty((Y_ROWS, width), scalars)
        ds, loaded = aligned_empty((Y_ROWS, width), scalars), aligned_empty((Y_ROWS, width), scalars)
        total, half = aligned_empty((Y_ROWS, width), scalars), np.empty((Y_ROWS, width), np.uint16)
        statistics = aligned_empty((3, width), scalars)
        for task in range(tasks * run // runs, tasks * (run + 1) // runs):
            entry = task // (q_blocks * k_blocks)
            i_first, j_first = task // k_blocks % q_blocks * q_block, task % k_blocks * k_block
            i_end, j_end = min(length_q, i_first + q_block), min(length_k, j_first + k_block)
            total[:] = 0
            for index in range(entry * summed, (entry + 1) * summed):
                for j0 in range(j_first, j_end, Y_ROWS):
                    columns = min(Y_ROWS, j_end - j0)
                    source = _address(k, itemsize, index, batch, j0, 0)
                    _load_panels(source, dtype, itemsize, k, columns, channels, scratch, k_panels)
                    source = _address(v, itemsize, index, batch, j0, 0)
                    _load_panels(source, dtype, itemsize, v, columns, channels_v, scratch_v, v_panels)
                    for i in range(i_first, i_end, width):
                        count = min(width, i_end - i)
                        if outside_band(i - j0, count, columns, band):
                            continue
                        source = _address(q, itemsize, index, batch, i, 0)
                        _load_panels(source, dtype, itemsize, q, count, channels, scratch, q_panels)
                        source = _address(grad, itemsize, index, batch, i, 0)
                        _load_panels(source, dtype, itemsize, grad, count, channels_v, scratch_v, grad_panels)
                        _load_softmax(softmax, delta, sum_itemsize, index, batch, i, count, statistics)
                        panels = _blocks(columns, width)
                        score_tile(k_panels, panels, q_panels, 0, channels, scores, score, scalars[0], scalars[1])
                        _product_tile(v_panels, panels, grad_panels, 0, channels_v, ds)
                        source = _address(mask, itemsize, index, batch, i, j0)
                        _masked_scores(source, mask, kind, dtype, scores, i - j0, count, columns, band, loaded, masked)
                        softmax_backward_step(masked, scores, ds, columns, statistics, 0, False)
                        for j in range(columns):
                            for c in range(count):
                                total[j, c] += ds[j, c]
            rows, columns = min(Y_ROWS, j_end - j_first), min(width, i_end - i_first)
            if shared[0]:
                for c in range(1, columns):
                    total[:, 0] += total[:, c]
                columns = 1
            if shared[1]:
                for j in range(1, rows):
                    total[0] += total[j]
                rows = 1
            target = _address(dmask, itemsize, entry * summed, batch, i_first, j_first)
            store_rows(total, half, rows, columns, target, dtype, dmask.column, dmask.row)


def _join(dy, dtypes, batch, channels, runs, parts):
    """dy, the sum of ``parts`` in their order."""
    dtype, itemsize = dtypes
    n, batches, length, padded = parts.shape
    for run in prange(runs):
        total, half = np.empty((1, padded), parts.dtype), np.empty((1, padded), np.uint16)
        for task in range(batches * length * run // runs, batches * length * (run + 1) // runs):
            index, i = task // length, task % length
            total[0] = parts[0, index, i]
            for part in range(1, n):
                for c in range(padded):
                    total[0, c] += parts[part, index, i, c]
            target = _address(dy, itemsize, index, batch, i, 0)
            store_rows(total, half, 1, channels, target, dtype, dy.row, dy.column)


join = kernel(parallel=True)(_join)
join_serial = kernel()(_join)
delta = kernel(parallel=True)(_delta)
delta_serial = kernel()(_delta)
backward = kernel(parallel=True)(_backward)
backward_serial = kernel()(_backward)
mask_gradient = kernel(parallel=True)(_mask_gradient)
mask_gradient_serial = kernel()(_mask_gradient)
