"""L1 scores and their vector-Jacobian product on the CPU.

Forward: a task is a block of queries against a range of keys of one batch entry. Queries and keys are packed into
panels, as many keys as fit the L2 cache, so that a row of the result is written from end to end. `vector.sum_and_score`
fills one panel-by-panel tile of distances at a time, and meanwhile scores the one before. What does not fill a tile,
and results that need more than a scale or a division, go through strips of scores in L1.

Backward: a task owns a block of rows of one gradient and runs over everything that contributes to it, in a fixed
order, so that the result does not depend on the number of threads. ``h = grad * F'(x) * scale`` exists one tile at a
time. Both gradients are one function: for dkey the roles of query and key are swapped, and so are the axes of h.
Where batch entries are work enough for all threads, a task is one of them, and makes both gradients at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from ..functions import DISTANCE, INVERSE, LAPLACIAN, NEGATIVE
from .elements import FLOAT32, FLOAT64, aligned_empty, apply_derivative, apply_score, load_rows, store_rows
from .jit import kernel
from .vector import (
    CACHE_LINE,
    address_of,
    chain_rule,
    fence,
    invert,
    lanes,
    pack,
    pack_from,
    panel_width,
    scatter_rows,
    sign_scatter,
    sign_scatter_both,
    sum_abs_diff,
    sum_and_score,
)

#: Channels summed in one run of `sum_abs_diff`. A longer row is a sum of such partial sums, so that its rounding error
#: does not grow with the number of channels.
CHANNELS_PER_SUM = 128

#: Rows of x, a multiple of `Y_BLOCK`, that h is made for at once where both gradients are: memory is read in long runs.
X_BLOCK = 256

#: Keys in a strip of scores that are stored together, where they do not go straight to the result.
STRIP = 64

#: Bytes of a result from which on it is written past the caches: of a smaller one they keep what is read next.
_PAST_CACHES = 1 << 22

#: Rows of y in one tile of the backward pass; partial sums over so many terms are added to the gradient.
Y_BLOCK = 64

_WIDTH4, _WIDTH8 = panel_width(4), panel_width(8)
_ROWS4, _ROWS8 = scatter_rows(4), scatter_rows(8)
_LANES4, _LANES8 = lanes(4), lanes(8)


class Matrix(NamedTuple):
    """Where the matrices of a batch lie: address of the first, and strides in elements.

    ``batch`` is the row of the table of batch strides that belongs to this array (row 0 of that table is the batch
    shape). For grad and scores in the backward pass, ``row`` runs along x and ``column`` along y.
    """

    data: int
    row: int
    column: int
    batch: int


@kernel()
def _blocks(n, size):
    return (n + size - 1) // size


@kernel()
def padded_channels(channels, like):
    """Channels of a row in scratch memory, whole vectors of numbers like those of the array ``like``."""
    step = _LANES4 if like.itemsize == 4 else _LANES8
    return _blocks(channels, step) * step


@kernel()
def _address(matrix, itemsize, index, batch, row, column):
    """Address of element (row, column) of batch entry ``index``."""
    offset = row * matrix.row + column * matrix.column
    for dim in range(batch.shape[1] - 1, -1, -1):
        size = batch[0, dim]
        offset += (index % size) * batch[matrix.batch, dim]
        index //= size
    return matrix.data + offset * itemsize


@kernel()
def _load_panels(source, dtype, itemsize, matrix, rows, channels, scratch, panels):
    """``rows`` rows of ``channels`` numbers as panels, padded with zeros; ``scratch`` is (width, padded channels)."""
    width = scratch.shape[0]
    as_they_are = dtype == (FLOAT32 if scratch.itemsize == 4 else FLOAT64) and matrix.column == 1
    for p in range(_blocks(rows, width)):
        start, count = source + p * width * matrix.row * itemsize, min(width, rows - p * width)
        if as_they_are and count == width and channels == scratch.shape[1]:
            pack_from(start, matrix.row, channels, panels, p)
        else:
            load_rows(start, dtype, matrix.row, matrix.column, count, channels, scratch)
            pack(scratch, 0, scratch.shape[1], panels, p)


@kernel()
def _scores(q_panels, q_index, k_panels, k_first, k_count, channels, tile, score, scale, eps):
    """Scores of the rows of one panel of queries and of ``k_count`` panels of keys, from panel ``k_first`` on."""
    width = tile.shape[0]
    for p in range(k_count):
        for first in range(0, max(channels, 1), CHANNELS_PER_SUM):
            count = min(CHANNELS_PER_SUM, channels - first)
            sum_abs_diff(q_panels, q_index, k_panels, k_first + p, first, count, tile, p * width)
        if score == INVERSE:
            invert(tile, p * width, scale, eps)
    if score != INVERSE:
        apply_score(tile, score, scale)


def _forward(q, k, out, dtype, itemsize, batch, sizes, blocks, score, scalars):
    """Scores of every batch entry.

    ``sizes`` is (batches, L, S, E). ``blocks`` is (queries in a task, keys in a task, keys in a tile, runs); a run is
    a set of tasks that share scratch memory. ``scalars`` is (scale, eps) in the accumulation type.
    """
    batches, length_q, length_k, channels = sizes
    q_block, k_block, tile_keys, runs = blocks
    q_blocks, k_blocks = _blocks(length_q, q_block), _blocks(length_k, k_block)
    tasks = batches * q_blocks * k_blocks
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded = padded_channels(channels, scalars)
    inverse, factor = score == INVERSE, -scalars[0] if score == NEGATIVE else scalars[0]
    direct = score != LAPLACIAN and itemsize == scalars.itemsize
    large = batches * length_q * length_k * itemsize >= _PAST_CACHES
    for run in prange(runs):
        scratch = aligned_empty((width, padded), scalars)
        q_panels = aligned_empty((q_block // width, padded, width), scalars)
        k_panels = aligned_empty((tile_keys // width, padded, width), scalars)
        tile = aligned_empty((width, STRIP), scalars)
        half = np.empty((width, STRIP), np.uint16)
        # The distances that were summed last, and where their scores belong: as yet there are none.
        distances = aligned_empty((width, width), scalars)
        distances[:] = 0
        to, stride, past_caches = address_of(distances), width, False
        for task in range(tasks * run // runs, tasks * (run + 1) // runs):
            index = task // (q_blocks * k_blocks)
            i0, j_first = task // k_blocks % q_blocks * q_block, task % k_blocks * k_block
            rows = min(q_block, length_q - i0)
            source = _address(q, itemsize, index, batch, i0, 0)
            _load_panels(source, dtype, itemsize, q, rows, channels, scratch, q_panels)
            keys, target = _address(k, itemsize, index, batch, 0, 0), _address(out, itemsize, index, batch, i0, 0)
            j_end = min(length_k, j_first + k_block)
            for j0 in range(j_first, j_end, tile_keys):
                columns = min(tile_keys, j_end - j0)
                source = keys + j0 * k.row * itemsize
                _load_panels(source, dtype, itemsize, k, columns, channels, scratch, k_panels)
                for p in range(_blocks(rows, width)):
                    place, count = target + (p * width * out.row + j0) * itemsize, min(width, rows - p * width)
                    done = columns // width if direct and count == width else 0  # panels of keys, straight to out
                    for c in range(done):
                        first = min(channels, CHANNELS_PER_SUM)
                        sum_and_score(
                            *(q_panels, p, k_panels, c, first, distances, to, stride, past_caches),
                            *(inverse, factor, scalars[1]),
                        )
                        to, stride = place + c * width * itemsize, out.row
                        past_caches = large and (to | stride * itemsize) % CACHE_LINE == 0
                        for first in range(CHANNELS_PER_SUM, channels, CHANNELS_PER_SUM):
                            more = min(CHANNELS_PER_SUM, channels - first)
                            sum_abs_diff(q_panels, p, k_panels, c, first, more, distances, 0)
                    for j in range(done * width, columns, STRIP):
                        some = min(STRIP, columns - j)
                        first, k_count = j // width, _blocks(some, width)
                        _scores(q_panels, p, k_panels, first, k_count, channels, tile, score, scalars[0], scalars[1])
                        store_rows(tile, half, count, some, place + j * itemsize, dtype, out.row, 1)
        sum_and_score(q_panels, 0, k_panels, 0, 0, distances, to, stride, past_caches, inverse, factor, scalars[1])
        fence()


@kernel()
def _score_tile(row_panels, column_panels, count, channels, strip, scores, score, scale, eps):
    """Scores of a block of x against ``count`` panels of y, or of y against x, computed anew."""
    width = strip.shape[0]
    for p in range(scores.shape[0] // width):
        _scores(row_panels, p, column_panels, 0, count, channels, strip, score, scale, eps)
        for r in range(width):
            for c in range(count * width):
                scores[p * width + r, c] = strip[r, c]


@kernel()
def _scatter_finite(x, y, h, x_is_row, h_panels, x_count, y_count, dx):
    """``dx[i] += sum_j h * sign(x[i] - y[j])`` for a tile of finite h, whose rows are x or y."""
    width, rows, step = (_WIDTH4, _ROWS4, _LANES4) if x.itemsize == 4 else (_WIDTH8, _ROWS8, _LANES8)
    panels = h.reshape((1, h.shape[0], h.shape[1]))
    if x_is_row:
        for p in range(_blocks(x_count, width)):
            pack(h, p * width, h.shape[1], h_panels, p)
        panels = h_panels
    for channel in range(0, x.shape[1], step):
        for i in range(0, x_count, rows):
            panel, column = (i // width, i % width) if x_is_row else (0, i)
            sign_scatter(x, i, y, panels, panel, column, y_count, channel, dx)


@kernel()
def _scatter_any(x, y, h, x_is_row, x_count, y_count, dx):
    """The same for any h: a product with sign 0, so that NaN and infinity spread as in the naive formula."""
    zero = x.dtype.type(0)
    for i in range(x_count):
        for e in range(x.shape[1]):
            total = zero  # of the tile first, as in sign_scatter: rows without NaN keep their bits
            for j in range(y_count):
                weight = h[i, j] if x_is_row else h[j, i]
                if x[i, e] > y[j, e]:
                    total += weight
                elif x[i, e] < y[j, e]:
                    total -= weight
                else:
                    total += weight * zero
            dx[i, e] += total


@kernel()
def _load_tile(matrix, dtype, itemsize, index, batch, i0, j0, x_count, y_count, x_is_row, tile):
    """The part of grad or scores that belongs to a block of x and a block of y; its rows are x or y."""
    source = _address(matrix, itemsize, index, batch, i0, j0)
    if x_is_row:
        load_rows(source, dtype, matrix.row, matrix.column, x_count, y_count, tile)
    else:
        load_rows(source, dtype, matrix.column, matrix.row, y_count, x_count, tile)


@kernel()
def _weights(grad, scores, dtype, itemsize, index, batch, i0, j0, x_count, y_count, x_is_row, anew, score, scale, s, h):
    """h of a block of x and a block of y, with rows of x or y; returns whether it is finite.

    ``s`` holds the scores if they were computed anew; otherwise it is scratch memory for them.
    """
    rows, columns = (x_count, y_count) if x_is_row else (y_count, x_count)
    stride, step = (grad.row, grad.column) if x_is_row else (grad.column, grad.row)
    saved_stride, saved_step = (scores.row, scores.column) if x_is_row else (scores.column, scores.row)
    power = 2 if score == INVERSE else 1 if score == LAPLACIAN else 0
    own, whole = (
        dtype == (FLOAT32 if h.itemsize == 4 else FLOAT64),
        columns % (_LANES4 if h.itemsize == 4 else _LANES8) == 0,
    )
    if own and whole and step == 1 and (anew or power == 0 or saved_step == 1):
        source = _address(grad, itemsize, index, batch, i0, j0)
        saved = source
        if anew:
            saved, saved_stride = address_of(s), s.shape[1]
        elif power > 0:
            saved = _address(scores, itemsize, index, batch, i0, j0)
        h[rows:] = 0
        factor = scale if score == DISTANCE else -scale
        return chain_rule(source, stride, saved, saved_stride, rows, columns, power, factor, h)
    _load_tile(grad, dtype, itemsize, index, batch, i0, j0, x_count, y_count, x_is_row, h)
    if power > 0 and not anew:
        _load_tile(scores, dtype, itemsize, index, batch, i0, j0, x_count, y_count, x_is_row, s)
    return apply_derivative(h, s, score, scale)


def _backward(x, y, grad, scores, dx, dtype, itemsize, batch, sizes, blocks, score, scalars):
    """``dx[i] = sum_j h[i, j] * sign(x[i] - y[j])``, summed also over the batch entries that share a row of x.

    ``scores.data`` is 0 when the forward result is not at hand; where needed it is then computed anew. ``sizes`` is
    (batches of dx, batches summed into each, rows of x, rows of y, E). ``blocks`` is (rows of x in a task, whether the
    rows of a tile of h are x, runs).
    """
    kept, summed, length_x, length_y, channels = sizes
    x_block, x_is_row, runs = blocks
    x_blocks, y_blocks = _blocks(length_x, x_block), _blocks(length_y, Y_BLOCK)
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded = padded_channels(channels, scalars)
    anew = score in (INVERSE, LAPLACIAN) and scores.data == 0
    tile_shape = (x_block, Y_BLOCK) if x_is_row else (Y_BLOCK, x_block)
    for run in prange(runs):
        x_rows, dx_rows = aligned_empty((x_block, padded), scalars), aligned_empty((x_block, padded), scalars)
        y_rows = aligned_empty((Y_BLOCK, padded), scalars)
        x_panels = aligned_empty((x_block // width, padded, width), scalars)
        y_panels = aligned_empty((Y_BLOCK // width, padded, width), scalars)
        h_panels = aligned_empty((x_block // width, Y_BLOCK, width), scalars)
        h, s = aligned_empty(tile_shape, scalars), aligned_empty(tile_shape, scalars)
        strip = aligned_empty((width, tile_shape[1]), scalars)
        half = np.empty((x_block, padded), np.uint16)
        for task in range(kept * x_blocks * run // runs, kept * x_blocks * (run + 1) // runs):
            entry, i0 = task // x_blocks * summed, task % x_blocks * x_block
            rows = min(x_block, length_x - i0)
            source = _address(x, itemsize, entry, batch, i0, 0)
            load_rows(source, dtype, x.row, x.column, rows, channels, x_rows)
            if anew:
                for p in range(x_block // width):
                    pack(x_rows, p * width, padded, x_panels, p)
            dx_rows[:] = 0
            for part in range(summed * y_blocks):
                index, j0 = entry + part // y_blocks, part % y_blocks * Y_BLOCK
                columns = min(Y_BLOCK, length_y - j0)
                source = _address(y, itemsize, index, batch, j0, 0)
                load_rows(source, dtype, y.row, y.column, columns, channels, y_rows)
                if anew:
                    for p in range(Y_BLOCK // width):
                        pack(y_rows, p * width, padded, y_panels, p)
                    row_panels, column_panels = (x_panels, y_panels) if x_is_row else (y_panels, x_panels)
                    _score_tile(
                        row_panels,
                        column_panels,
                        tile_shape[1] // width,
                        channels,
                        strip,
                        s,
                        score,
                        scalars[0],
                        scalars[1],
                    )
                if _weights(
                    *(grad, scores, dtype, itemsize, index, batch, i0, j0, rows, columns, x_is_row, anew, score),
                    *(scalars[0], s, h),
                ):
                    _scatter_finite(x_rows, y_rows, h, x_is_row, h_panels, rows, columns, dx_rows)
                else:
                    _scatter_any(x_rows, y_rows, h, x_is_row, rows, columns, dx_rows)
            target = _address(dx, itemsize, entry, batch, i0, 0)
            store_rows(dx_rows, half, rows, channels, target, dtype, dx.row, dx.column)


@kernel()
def add(source, target):
    """``target += source``; NumPy's own operators become loops that do not vectorise."""
    numbers, sums = source.ravel(), target.ravel()
    for i in range(sums.size):
        sums[i] += numbers[i]


@kernel()
def clear(target):
    """``target[...] = 0``, likewise."""
    numbers = target.ravel()
    for i in range(numbers.size):
        numbers[i] = 0


@kernel()
def _scatter_both(x, y, h, column, finite, x_count, y_count, dx, dy):
    """`_scatter_finite` or `_scatter_any` for x, and for y; rows of h are y, its columns from ``column`` on are x.

    ``dy`` is set, not added to.
    """
    clear(dy)
    if finite:
        rows, step = (_ROWS4, _LANES4) if x.itemsize == 4 else (_ROWS8, _LANES8)
        panels = h.reshape((1, h.shape[0], h.shape[1]))
        for channel in range(0, x.shape[1], step):
            for i in range(0, x_count, rows):
                sign_scatter_both(x, i, y, panels, column + i, y_count, channel, dx, dy)
    else:
        own = h[:, column : column + x_count].copy()
        _scatter_any(x, y, own, False, x_count, y_count, dx)
        _scatter_any(y, x, own, True, y_count, x_count, dy)


def _backward_both(x, y, grad, scores, dx, dy, dtype, itemsize, batch, sizes, runs, score, scalars):
    """Both gradients, bit for bit as `_backward` makes them, with h and the signs computed once for both.

    A task is a batch entry, which no other shares rows with. Along the rows of grad and scores runs x. ``sizes`` is
    (batches, rows of x, rows of y, E).
    """
    batches, length_x, length_y, channels = sizes
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded = padded_channels(channels, scalars)
    anew = score in (INVERSE, LAPLACIAN) and scores.data == 0
    whole_x, y_block = _blocks(length_x, width) * width, min(Y_BLOCK, _blocks(length_y, width) * width)
    for run in prange(runs):
        x_rows, dx_rows = aligned_empty((whole_x, padded), scalars), aligned_empty((whole_x, padded), scalars)
        y_rows = aligned_empty((y_block, padded), scalars)
        dy_rows, dy_part = aligned_empty((y_block, padded), scalars), aligned_empty((y_block, padded), scalars)
        x_panels = aligned_empty((X_BLOCK // width, padded, width), scalars)
        y_panels = aligned_empty((y_block // width, padded, width), scalars)
        # One line more in a row of h: its columns are read one by one, and would all meet in a few sets of the cache.
        h_stride = X_BLOCK + CACHE_LINE // scalars.itemsize
        h, s = aligned_empty((y_block, h_stride), scalars), aligned_empty((y_block, h_stride), scalars)
        clear(s)  # what is not finite costs time, also where it is not used
        strip, half = aligned_empty((width, X_BLOCK), scalars), np.empty((max(whole_x, y_block), padded), np.uint16)
        for index in range(batches * run // runs, batches * (run + 1) // runs):
            source = _address(x, itemsize, index, batch, 0, 0)
            load_rows(source, dtype, x.row, x.column, length_x, channels, x_rows)
            clear(dx_rows)
            for i0 in range(0, length_y, Y_BLOCK):
                rows = min(Y_BLOCK, length_y - i0)
                source = _address(y, itemsize, index, batch, i0, 0)
                load_rows(source, dtype, y.row, y.column, rows, channels, y_rows)
                if anew:
                    for p in range(y_block // width):
                        pack(y_rows, p * width, padded, y_panels, p)
                clear(dy_rows)
                for j0 in range(0, length_x, X_BLOCK):
                    columns = min(X_BLOCK, length_x - j0)
                    if anew:
                        panels = _blocks(columns, width)
                        for p in range(panels):
                            pack(x_rows, j0 + p * width, padded, x_panels, p)
                        _score_tile(y_panels, x_panels, panels, channels, strip, s, score, scalars[0], scalars[1])
                    finite = _weights(
                        *(grad, scores, dtype, itemsize, index, batch, i0, j0, rows, columns, True, anew, score),
                        *(scalars[0], s, h),
                    )
                    for j in range(j0, j0 + columns, Y_BLOCK):
                        count = min(Y_BLOCK, length_x - j)
                        x_part, dx_part = x_rows[j : j + Y_BLOCK], dx_rows[j : j + Y_BLOCK]
                        _scatter_both(x_part, y_rows, h, j - j0, finite, count, rows, dx_part, dy_part)
                        add(dy_part, dy_rows)
                target = _address(dy, itemsize, index, batch, i0, 0)
                store_rows(dy_rows, half, rows, channels, target, dtype, dy.row, dy.column)
            target = _address(dx, itemsize, index, batch, 0, 0)
            store_rows(dx_rows, half, length_x, channels, target, dtype, dx.row, dx.column)


forward = kernel(parallel=True)(_forward)
forward_serial = kernel()(_forward)
backward = kernel(parallel=True)(_backward)
backward_serial = kernel()(_backward)
backward_both = kernel(parallel=True)(_backward_both)
backward_both_serial = kernel()(_backward_both)
