"""Scores of 8-bit queries and keys on the CPU; as `scores`, of which it uses the parts, but with sums of bytes."""

from __future__ import annotations

import numpy as np
from numba import prange

from ..functions import INVERSE
from .elements import FLOAT32, apply_score, store_rows
from .jit import kernel
from .scores import _address, _blocks
from .vector import invert, panel_width, peek
from .vector_bytes import QUERY_ROWS, byte_distances, key_rows, peek_word

#: Rows of a tile of scores, those that `invert` takes at once.
TILE_ROWS = panel_width(4)

#: Keys in a strip of scores that are stored together.
STRIP = 64

#: Bytes of a word.
WORD = 8

_KEY_ROWS = key_rows()

#: Makes signed bytes unsigned ones with the same differences.
_SIGN_BITS = np.uint64(0x8080808080808080)


@kernel()
def load_words(source, row_stride, column_stride, rows, channels, signed, panels):
    """``rows`` rows of ``channels`` bytes as panels of words, padded with what adds nothing to a distance."""
    width = panels.shape[2]
    flip = _SIGN_BITS if signed else np.uint64(0)
    whole = channels // WORD if column_stride == 1 else 0
    for r in range(_blocks(rows, width) * width):
        p, lane = r // width, r % width
        if r >= rows:
            panels[p, :, lane] = 0
            continue
        start = source + r * row_stride
        for w in range(whole):
            panels[p, w, lane] = peek_word(start + WORD * w) ^ flip
        for w in range(whole, panels.shape[1]):
            word = np.uint64(0)
            for c in range(min(WORD, channels - WORD * w)):
                byte = peek(start, (WORD * w + c) * column_stride, np.uint8(0))
                word |= np.uint64(byte) << np.uint64(8 * c)
            panels[p, w, lane] = word ^ flip


@kernel()
def score_tile(q_panels, q_first, q_count, k_panels, k_count, tile, score, scale, eps):
    """Scores of a few panels of queries, from ``q_first`` on, and ``k_count`` panels of keys."""
    for c in range(k_count):
        for r in range(q_count):
            byte_distances(q_panels, q_first + r, k_panels, c, q_panels.shape[1], tile, r * QUERY_ROWS, c * _KEY_ROWS)
    if score == INVERSE:
        for column in range(0, k_count * _KEY_ROWS, TILE_ROWS):
            invert(tile, column, scale, eps)
    else:
        apply_score(tile, score, scale)


def _forward(q, k, quant_scale, out, signed, batch, sizes, blocks, score, scalars):
    """Scores of every batch entry, in float32; for sizes, blocks and scalars see `scores._forward`.

    Keys are packed as many at once as blocks say, so that rows of the result are written far along.

    Distances of an entry are multiplied by its ``quant_scale`` too, unless that has address 0.
    """
    batches, length_q, length_k, channels = sizes
    q_block, k_block, tile_keys, runs = blocks
    q_blocks, k_blocks = _blocks(length_q, q_block), _blocks(length_k, k_block)
    tasks, words = batches * q_blocks * k_blocks, _blocks(channels, WORD)
    for run in prange(runs):
        q_panels = np.empty((q_block // QUERY_ROWS, words, QUERY_ROWS), np.uint64)
        k_panels = np.empty((tile_keys // _KEY_ROWS, words, _KEY_ROWS), np.uint64)
        tile, half = np.empty((TILE_ROWS, STRIP), np.float32), np.empty((0, 0), np.uint16)
        for task in range(tasks * run // runs, tasks * (run + 1) // runs):
            index = task // (q_blocks * k_blocks)
            i0, j_first = task // k_blocks % q_blocks * q_block, task % k_blocks * k_block
            rows, scale = min(q_block, length_q - i0), scalars[0]
            if quant_scale.data != 0:
                scale *= peek(_address(quant_scale, 4, index, batch, 0, 0), 0, np.float32(0))
            load_words(_address(q, 1, index, batch, i0, 0), q.row, q.column, rows, channels, signed, q_panels)
            j_end = min(length_k, j_first + k_block)
            for j0 in range(j_first, j_end, tile_keys):
                columns = min(tile_keys, j_end - j0)
                load_words(_address(k, 1, index, batch, j0, 0), k.row, k.column, columns, channels, signed, k_panels)
                for i in range(0, rows, TILE_ROWS):
                    count = min(TILE_ROWS, rows - i)
                    first, panels = i // QUERY_ROWS, _blocks(count, QUERY_ROWS)
                    place = _address(out, 4, index, batch, i0 + i, j0)
                    for j in range(0, columns, STRIP):
                        some = min(STRIP, columns - j)
                        keys = k_panels[j // _KEY_ROWS :]
                        score_tile(
                            q_panels, first, panels, keys, _blocks(some, _KEY_ROWS), tile, score, scale, scalars[1]
                        )
                        store_rows(tile, half, count, some, place + 4 * j, FLOAT32, out.row, 1)


forward = kernel(parallel=True)(_forward)
forward_serial = kernel()(_forward)
