"""The Jacobian-vector product of the L1 scores on the CPU: how they change along tangents of query and key.

A task is a block of queries against all keys of one batch entry. Rows and their tangents are packed into panels, and
`vector.sign_gather` fills one panel-by-panel tile at a time; F' is applied while the tile is in L1.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..functions import INVERSE, LAPLACIAN
from .elements import aligned_empty, apply_derivative, load_rows, store_rows
from .jit import kernel
from .scores import _WIDTH4, _WIDTH8, CHANNELS_PER_SUM, _address, _blocks, _load_panels, padded_channels
from .vector import sign_gather


def _jvp(q, k, tangent_q, tangent_k, scores, out, dtype, itemsize, batch, sizes, blocks, score, scalars):
    """``out[i, j] = F'(x[i, j]) * scale * sum_k sign(q[i] - k[j]) * (tangent_q[i] - tangent_k[j])``.

    ``sizes`` is (batches, L, S, E); ``blocks`` is (queries in a task, keys in a tile, runs); ``scores`` is not read
    where F' is constant.
    """
    batches, length_q, length_k, channels = sizes
    q_block, tile_keys, runs = blocks
    q_blocks = _blocks(length_q, q_block)
    width = _WIDTH4 if scalars.itemsize == 4 else _WIDTH8
    padded = padded_channels(channels, scalars)
    for run in prange(runs):
        scratch = aligned_empty((width, padded), scalars)
        rows = aligned_empty((q_block // width, padded, width), scalars)
        columns = aligned_empty((tile_keys // width, padded, width), scalars)
        row_tangents, column_tangents = aligned_empty(rows.shape, scalars), aligned_empty(columns.shape, scalars)
        tile, s = aligned_empty((width, tile_keys), scalars), aligned_empty((width, tile_keys), scalars)
        half = np.empty((width, tile_keys), np.uint16)
        for task in range(batches * q_blocks * run // runs, batches * q_blocks * (run + 1) // runs):
            index, i0 = task // q_blocks, task % q_blocks * q_block
            count = min(q_block, length_q - i0)
            source = _address(q, itemsize, index, batch, i0, 0)
            _load_panels(source, dtype, itemsize, q, count, channels, scratch, rows)
            source = _address(tangent_q, itemsize, index, batch, i0, 0)
            _load_panels(source, dtype, itemsize, tangent_q, count, channels, scratch, row_tangents)
            for j0 in range(0, length_k, tile_keys):
                keys = min(tile_keys, length_k - j0)
                source = _address(k, itemsize, index, batch, j0, 0)
                _load_panels(source, dtype, itemsize, k, keys, channels, scratch, columns)
                source = _address(tangent_k, itemsize, index, batch, j0, 0)
                _load_panels(source, dtype, itemsize, tangent_k, keys, channels, scratch, column_tangents)
                for p in range(_blocks(count, width)):
                    i, here = i0 + p * width, min(width, count - p * width)
                    for c in range(_blocks(keys, width)):
                        for first in range(0, channels, CHANNELS_PER_SUM):
                            n = min(CHANNELS_PER_SUM, channels - first)
                            sign_gather(rows, row_tangents, p, columns, column_tangents, c, first, n, tile, c * width)
                    if score in (INVERSE, LAPLACIAN):
                        source = _address(scores, itemsize, index, batch, i, j0)
                        load_rows(source, dtype, scores.row, scores.column, here, keys, s)
                    apply_derivative(tile[:here], s[:here], score, scalars[0])
                    target = _address(out, itemsize, index, batch, i, j0)
                    store_rows(tile, half, here, keys, target, dtype, out.row, 1)


jvp = kernel(parallel=True)(_jvp)
jvp_serial = kernel()(_jvp)
