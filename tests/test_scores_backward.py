"""`l1_scores_backward` against autograd through the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    BROADCAST,
    DTYPES,
    LENGTHS,
    NUMPY_LAYOUTS,
    SCORES,
    TORCH_LAYOUTS,
    assert_identical,
    options,
    to_numpy,
)

import l1attn_cupy as l1
from l1attn_cupy import reference, testing


def both_ways(grad, query, key, **call):
    """The gradients from the saved scores, and with the scores computed anew."""
    saved = l1.l1_scores(query, key, **call)
    yield l1.l1_scores_backward(grad, query, key, scores=saved, **call)
    yield l1.l1_scores_backward(grad, query, key, **call)


def assert_both_identical(pair, expected):
    for result, wanted in zip(pair, expected, strict=True):
        assert_identical(result, wanted)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_scores_backward_odd_sizes(lengths):
    """No size is a multiple of a block: the last block of rows, keys and channels is a part of one."""
    length_q, length_k, channels = lengths
    which = LENGTHS.index(lengths)
    call = options(SCORES[which % 4], channels)
    for dtype in ("float32", DTYPES[which // 2 % 4]):
        query, key, grad = testing.inputs((2, length_q, channels), (2, length_k, channels), dtype)
        expected = testing.Expected(query, key, grad, **call)
        for gradients in both_ways(grad, query, key, **call):
            expected.assert_gradients(*gradients)


@pytest.mark.parametrize("ties", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_backward_every_score_and_dtype(score, dtype, ties):
    call = {"score": score, "scale": 0.3, "eps": 0.02}
    query, key, grad = testing.inputs((3, 33, 31), (3, 65, 31), dtype, ties=ties)
    expected = testing.Expected(query, key, grad, **call)
    for gradients in both_ways(grad, query, key, **call):
        expected.assert_gradients(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_backward_identical_rows(score, dtype):
    """Where query and key are equal, the slope of F is at its steepest and the gradient still exactly 0."""
    row = testing.inputs((1, 65), (1, 65), dtype)[0]
    query, key = row.expand(33, 65), row.expand(97, 65)
    grad = torch.randn(33, 97).to(row.dtype)
    for gradients in both_ways(grad, query, key, score=score):
        for gradient in gradients:
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_backward_tied_channel(dtype):
    """A channel in which all rows tie has gradient exactly 0 beside others that have not."""
    query, key, grad = testing.inputs((33, 65), (97, 65), dtype)
    query[:, 40], key[:, 40] = 0.25, 0.25
    for dquery, dkey in both_ways(grad, query, key):
        assert not dquery[:, 40].any()
        assert not dkey[:, 40].any()
        assert dquery[:, 39].all()
        assert dkey[:, 41].all()


def test_scores_backward_signed_zeros_tie():
    """0 and -0 are equal."""
    dquery, dkey = l1.l1_scores_backward(np.ones((1, 1)), np.array([[0.0, -0.0]]), np.array([[-0.0, 0.0]]))
    assert not dquery.any()
    assert not dkey.any()


@pytest.mark.parametrize("shapes", [((0, 5, 3), (0, 7, 3)), ((0, 3), (7, 3)), ((5, 3), (0, 3)), ((5, 0), (7, 0))])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_scores_backward_empty(shapes, library):
    """Whatever is empty, gradients have the shapes of query and key; an empty sum is 0."""
    query, key, grad = testing.inputs(*shapes, "float32")
    if library == "numpy":
        query, key, grad = (to_numpy(array) for array in (query, key, grad))
    for dquery, dkey in both_ways(grad, query, key):
        assert (dquery.shape, dkey.shape) == (query.shape, key.shape)
        assert not dquery.any()
        assert not dkey.any()


def test_scores_backward_empty_batch_broadcast():
    """A key that is shared by no batch entry at all has gradient 0."""
    query, key, grad = testing.inputs((0, 5, 3), (7, 3), "float32")
    for dquery, dkey in both_ways(grad, query, key):
        assert dquery.shape == (0, 5, 3)
        assert_identical(dkey, torch.zeros(7, 3))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("where", ["query", "key", "grad", "all"])
def test_scores_backward_nan_and_infinity(where, score, dtype):
    """They spread as autograd spreads them through the formula; inf * sign(0) is NaN there too."""
    query, key, grad = testing.inputs((33, 65), (97, 65), dtype, ties=True)
    if where in ("query", "all"):
        query[1, 3], query[2, 64], query[3, 0] = np.inf, -np.inf, np.nan
    if where in ("key", "all"):
        key[5, 3], key[70, 64], key[96, 33] = np.inf, -np.inf, np.nan
    if where in ("grad", "all"):
        grad[7, 5], grad[8, 96], grad[32, 0] = np.inf, -np.inf, np.nan
    call = {"score": score, "scale": 0.05}  # no score that rounds to 0, and so no inf * 0 from rounding
    exact = reference.l1_scores_backward(grad, query, key, **call)
    for gradients in both_ways(grad, query, key, **call):
        for result, expected in zip(gradients, exact, strict=True):
            testing.assert_same_special(result, expected.to(result.dtype))


def test_scores_backward_finite_rows_beside_infinite_ones():
    """An infinite gradient takes a slower loop; the rows beside it are still right."""
    query, key, grad = testing.inputs((33, 65), (97, 65), "float32")
    grad[7, 5] = np.inf
    dquery, dkey = l1.l1_scores_backward(grad, query, key)
    assert not dquery[7].isfinite().any()
    rows_q, rows_k = [i for i in range(33) if i != 7], [j for j in range(97) if j != 5]
    grad[7, 5] = 0
    expected = testing.Expected(query, key, grad)
    clean = l1.l1_scores_backward(grad, query, key)
    for gradient, good, rows in zip((dquery, dkey), clean, (rows_q, rows_k), strict=True):
        good[rows] = gradient[rows]
    expected.assert_gradients(*clean)


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
def test_scores_backward_numpy_layouts(layout):
    """Whatever the strides of the arguments, the same bits."""
    query, key, grad = (to_numpy(a) for a in testing.inputs((3, 33, 17), (3, 31, 17), "float32"))
    scores = l1.l1_scores(query, key)
    expected = l1.l1_scores_backward(grad, query, key, scores=scores)
    change = NUMPY_LAYOUTS[layout]
    changed = [change(grad), change(query), change(key)]
    assert_both_identical(l1.l1_scores_backward(*changed, scores=change(scores)), expected)
    assert_both_identical(l1.l1_scores_backward(*changed), expected)
    assert_both_identical(l1.l1_scores_backward(change(grad), query, key, scores=scores), expected)
    assert_both_identical(l1.l1_scores_backward(grad, query, key, scores=change(scores)), expected)


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_backward_torch_layouts(layout, dtype):
    query, key, grad = testing.inputs((3, 33, 17), (3, 31, 17), dtype)
    scores = l1.l1_scores(query, key)
    expected = l1.l1_scores_backward(grad, query, key, scores=scores)
    change = TORCH_LAYOUTS[layout]
    changed = [change(array) for array in (grad, query, key)]
    assert_both_identical(l1.l1_scores_backward(*changed, scores=change(scores)), expected)


def test_scores_backward_expanded_grad():
    """A gradient with stride 0 in every dimension, as the gradient of a sum is."""
    query, key, _ = testing.inputs((3, 33, 17), (3, 31, 17), "float32")
    grad = torch.tensor(0.5)
    expected = l1.l1_scores_backward(grad.expand(3, 33, 31).contiguous(), query, key)
    assert_both_identical(l1.l1_scores_backward(grad.expand(3, 33, 31), query, key), expected)


@pytest.mark.parametrize("score", ["inverse", "distance"])
@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_scores_backward_broadcast(shapes, score):
    """Gradients are summed over the batch dimensions in which an argument was broadcast."""
    query, key, grad = testing.inputs(*shapes, "float32")
    expected = testing.Expected(query, key, grad, score=score)
    for dquery, dkey in both_ways(grad, query, key, score=score):
        assert (dquery.shape, dkey.shape) == (query.shape, key.shape)
        expected.assert_gradients(dquery, dkey)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score", SCORES)
def test_scores_backward_same_bits_with_saved_scores(score, dtype):
    """Without rounding in between, saved scores and scores computed anew are the same numbers."""
    query, key, grad = testing.inputs((2, 97, 65), (2, 129, 65), dtype)
    saved, anew = both_ways(grad, query, key, score=score)
    assert_both_identical(saved, anew)


def test_scores_backward_uses_the_saved_scores():
    """F' comes from ``scores``: other scores give other gradients where F is curved, and are ignored elsewhere."""
    query, key, grad = testing.inputs((5, 3), (7, 3), "float64")
    for score in SCORES:
        scores = l1.l1_scores(query, key, score=score)
        expected = l1.l1_scores_backward(grad, query, key, score=score)
        doubled = l1.l1_scores_backward(grad, query, key, score=score, scores=2 * scores)
        factor = {"inverse": 4, "laplacian": 2}.get(score, 1)
        for result, wanted in zip(doubled, expected, strict=True):
            torch.testing.assert_close(result, factor * wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_backward_same_bits_wherever_a_row_sits(dtype):
    """The gradient of a batch entry does not depend on the others, nor that of a query on other queries."""
    query, key, grad = testing.inputs((5, 97, 65), (5, 129, 65), dtype)
    dquery, dkey = l1.l1_scores_backward(grad, query, key)
    assert_both_identical(l1.l1_scores_backward(grad, query, key), (dquery, dkey))
    assert_both_identical(l1.l1_scores_backward(grad[3], query[3], key[3]), (dquery[3], dkey[3]))
    flipped = l1.l1_scores_backward(grad.flip(0), query.flip(0), key.flip(0))
    assert_both_identical([gradient.flip(0) for gradient in flipped], (dquery, dkey))
    rows = l1.l1_scores_backward(grad[3, 40:41], query[3, 40:41], key[3])
    assert_identical(rows[0], dquery[3, 40:41])


@pytest.mark.parametrize("infinite", [False, True], ids=["finite", "infinite"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_scores_backward_same_bits_in_one_pass_or_two(dtype, infinite):
    """Batch entries that share no rows may have both gradients from one pass; those that do have two."""
    query, key, grad = testing.inputs((3, 131, 33), (3, 321, 33), dtype, ties=True)
    query[1:], key[1:] = query[0], key[0]
    if infinite:
        grad[0, 70, 300] = torch.inf
    both = l1.l1_scores_backward(grad, query, key, scale=0.3)
    shared_key = l1.l1_scores_backward(grad, query, key[:1], scale=0.3)[0]
    shared_query = l1.l1_scores_backward(grad, query[:1], key, scale=0.3)[1]
    assert_both_identical(both, (shared_key, shared_query))
    transposed = grad.mT.contiguous().mT
    assert_both_identical(l1.l1_scores_backward(transposed, query, key, scale=0.3), both)


def test_scores_backward_symmetric():
    """Exchanging query and key exchanges their gradients, bit for bit."""
    query, key, grad = testing.inputs((65, 33), (97, 33), "float32")
    dquery, dkey = l1.l1_scores_backward(grad, query, key)
    assert_both_identical(l1.l1_scores_backward(grad.mT, key, query), (dkey, dquery))
