"""Panels of queries and keys for attention, of numbers or of bytes: which of the two is decided by their type.

Numbers are as in `vector`, bytes as in `vector_bytes`. A *lane panel* belongs to the lanes of a tile of scores, a *row
panel* to its rows.
"""

from __future__ import annotations

from numba.core import types
from numba.extending import overload

from ..functions import INVERSE
from . import vector_attention
from .elements import aligned_empty, apply_score
from .jit import kernel
from .quantized import WORD, load_words
from .scores import _blocks, _load_panels, padded_channels
from .vector import invert, panel_width
from .vector_bytes import QUERY_ROWS, byte_distances, key_rows

_WIDTH4, _WIDTH8 = panel_width(4), panel_width(8)
_LANES = key_rows()


def new_panels(rows, channels, of_lanes, like):
    """Memory for ``rows`` rows of so many channels, a multiple of the width of a tile; ``like`` tells of what type."""
    raise NotImplementedError("cpu.panels is for compiled kernels")


def load_panels(source, dtype, itemsize, matrix, rows, channels, scratch, panels):
    """``rows`` rows at the address ``source``. For bytes ``dtype`` is 1 if they are signed, and scratch not used."""
    raise NotImplementedError("cpu.panels is for compiled kernels")


def score_panels(row_panels, count, lane_panels, panel, channels, tile, score, scale, eps):
    """Scores of ``count`` times as many rows of a tile as it has lanes, and of these, which are number ``panel``."""
    raise NotImplementedError("cpu.panels is for compiled kernels")


def _chosen(of_bytes, of_numbers, array_type):
    return of_bytes if isinstance(array_type.dtype, types.Integer) else of_numbers


@overload(new_panels)
def _new(rows, channels, of_lanes, like):
    return _chosen(_new_words, _new_numbers, like)


@overload(load_panels)
def _load(source, dtype, itemsize, matrix, rows, channels, scratch, panels):
    return _chosen(_load_words, _load_numbers, panels)


@overload(score_panels, jit_options={"forceinline": True})
def _score(row_panels, count, lane_panels, panel, channels, tile, score, scale, eps):
    return _chosen(_score_words, _score_numbers, row_panels)


def _new_words(rows, channels, of_lanes, like):
    width = _LANES if of_lanes else QUERY_ROWS
    return aligned_empty((rows // width, _blocks(channels, WORD), width), like)


def _new_numbers(rows, channels, of_lanes, like):
    width = _WIDTH4 if like.itemsize == 4 else _WIDTH8
    return aligned_empty((rows // width, padded_channels(channels, like), width), like)


def _load_words(source, dtype, itemsize, matrix, rows, channels, scratch, panels):
    load_words(source, matrix.row, matrix.column, rows, channels, dtype == 1, panels)


def _load_numbers(source, dtype, itemsize, matrix, rows, channels, scratch, panels):
    _load_panels(source, dtype, itemsize, matrix, rows, channels, scratch, panels)


def _score_words(row_panels, count, lane_panels, panel, channels, tile, score, scale, eps):
    _score_bytes(row_panels, count, lane_panels, panel, tile, score, scale, eps)


def _score_numbers(row_panels, count, lane_panels, panel, channels, tile, score, scale, eps):
    vector_attention.score_panels(row_panels, count, lane_panels, panel, channels, tile, score, scale, eps)


@kernel()
def _score_bytes(row_panels, count, lane_panels, panel, tile, score, scale, eps):
    width = tile.shape[1]
    words, each = row_panels.shape[1], width // _LANES
    for r in range(count * width // QUERY_ROWS):
        for c in range(each):
            byte_distances(row_panels, r, lane_panels, panel * each + c, words, tile, r * QUERY_ROWS, c * _LANES)
    for top in range(0, count * width, width):
        if score == INVERSE:
            invert(tile[top : top + width], 0, scale, eps)
        else:
            apply_score(tile[top : top + width], score, scale)
