"""Scores and gradients at shapes, strides, dtypes and options that Hypothesis draws, against float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch
from cases import DTYPES, SCORES, to_numpy
from hypothesis import assume, given, settings

import l1attn_cupy as l1
from l1attn_cupy import testing

MOST_TERMS = 1 << 17
LENGTH = st.integers(0, 6) | st.sampled_from([15, 16, 17, 31, 33, 64, 65, 70])


class Call(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    grad: torch.Tensor
    layouts: list[Any]
    library: str
    options: dict[str, Any]

    def arguments(self) -> list[Any]:
        """Query, key and gradient in their layouts, as arrays of their library."""
        arrays = [to_numpy(array) for array in (self.query, self.key, self.grad)]
        arrays = [_lay_out(array, *layout) for array, layout in zip(arrays, self.layouts, strict=True)]
        if self.library == "numpy":
            return arrays
        return [_as_torch(array) for array in arrays]


def _lay_out(array: np.ndarray, order: list[int], steps: list[int]) -> np.ndarray:
    """The same numbers with dimensions in another order in memory, and gaps or negative strides."""
    shape = [array.shape[dim] * abs(steps[dim]) for dim in order]
    buffer = np.full(shape, -1, array.dtype)[tuple(slice(None, None, steps[dim]) for dim in order)]
    view = buffer.transpose(np.argsort(order))
    view[...] = array
    return view


def _as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    batch = draw(st.lists(st.sampled_from([1, 2, 3, 0]), max_size=3))
    length_q, length_k, channels = draw(LENGTH), draw(LENGTH), draw(LENGTH)
    assume(math.prod((*batch, length_q, length_k, channels)) <= MOST_TERMS)
    batches = []
    for _ in ("query", "key"):
        own = [n if draw(st.booleans()) else 1 for n in batch]
        batches.append(own[draw(st.integers(0, len(own))) if all(n == 1 for n in own) else 0 :])
    dtype = draw(st.sampled_from(DTYPES))
    query, key, grad = testing.inputs(
        (*batches[0], length_q, channels),
        (*batches[1], length_k, channels),
        dtype,
        ties=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    library = draw(st.sampled_from(["numpy", "torch"]))
    steps = st.sampled_from([1, 1, 2, 3] + [-1, -2] * (library == "numpy"))
    layouts = [
        (draw(st.permutations(range(array.dim()))), [draw(steps) for _ in range(array.dim())])
        for array in (query, key, grad)
    ]
    options = {
        "score": draw(st.sampled_from(SCORES)),
        "scale": draw(st.sampled_from([1.0, 0.05, 0.3])),
        "eps": draw(st.sampled_from([1e-3, 0.5])),
    }
    return Call(query, key, grad, layouts, library, options)


@settings(max_examples=100, derandomize=True)
@given(calls())
def test_scores_any_call(call):
    query, key, _ = call.arguments()
    result = l1.l1_scores(query, key, **call.options)
    testing.Expected(call.query, call.key, **call.options).assert_scores(result)


@settings(max_examples=100, derandomize=True)
@given(calls())
def test_scores_backward_any_call(call):
    query, key, grad = call.arguments()
    expected = testing.Expected(call.query, call.key, call.grad, **call.options)
    expected.assert_gradients(*l1.l1_scores_backward(grad, query, key, **call.options))
    scores = l1.l1_scores(query, key, **call.options)
    expected.assert_gradients(*l1.l1_scores_backward(grad, query, key, scores=scores, **call.options))
