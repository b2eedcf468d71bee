"""`l1_scores` against the formula in float64."""

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
from l1attn_cupy.cpu import scores, threads


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_scores_odd_sizes(lengths):
    """No size is a multiple of a block: the last block of rows, keys and channels is a part of one."""
    length_q, length_k, channels = lengths
    which = LENGTHS.index(lengths)
    call = options(SCORES[which % 4], channels)
    for dtype in ("float32", DTYPES[which // 2 % 4]):
        query, key, _ = testing.inputs((2, length_q, channels), (2, length_k, channels), dtype)
        testing.Expected(query, key, **call).assert_scores(l1.l1_scores(query, key, **call))


@pytest.mark.parametrize("score", ["inverse", "laplacian"])
@pytest.mark.parametrize("lengths", [(33, 131, 1031), (1, 1057, 300)], ids=str)
def test_scores_many_tiles_of_keys(lengths, score):
    """Rows are so long that keys come in several tiles, and queries so few that threads share out the keys."""
    length_q, length_k, channels = lengths
    call = options(score, channels)
    query, key, _ = testing.inputs((length_q, channels), (length_k, channels), "float32")
    result = l1.l1_scores(query, key, **call)
    testing.Expected(query, key, **call).assert_scores(result)
    assert_identical(l1.l1_scores(query, key[70:99], **call), result[:, 70:99])


@pytest.mark.parametrize("ties", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_every_score_and_dtype(score, dtype, ties):
    call = {"score": score, "scale": 0.3, "eps": 0.02}
    query, key, _ = testing.inputs((3, 33, 31), (3, 65, 31), dtype, ties=ties)
    testing.Expected(query, key, **call).assert_scores(l1.l1_scores(query, key, **call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_identical_rows(dtype):
    """A distance of exactly 0, also after channels that cancel: the score is F(0), 1 / eps by default."""
    query = testing.inputs((33, 65), (1, 65), dtype)[0]
    precision = torch.promote_types(query.dtype, torch.float32)
    f_of_0 = {"inverse": 1 / torch.tensor(1e-3, dtype=precision), "laplacian": 1, "distance": 0, "negative": 0}
    for score in SCORES:
        result = l1.l1_scores(query, query.clone(), score=score).diagonal()
        assert torch.equal(result, torch.full_like(result, f_of_0[score])), score


@pytest.mark.parametrize(
    "shapes", [((0, 5, 3), (0, 7, 3)), ((0, 3), (7, 3)), ((5, 3), (0, 3)), ((2, 0, 1, 5, 3), (7, 3))]
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_scores_empty(shapes, library):
    """No batch, no query or no key: an empty result of the right shape."""
    query, key, grad = testing.inputs(*shapes, "float32")
    arguments = [to_numpy(query), to_numpy(key)] if library == "numpy" else [query, key]
    result = l1.l1_scores(*arguments)
    assert type(result) is type(arguments[0])
    assert result.shape == grad.shape
    assert 0 in result.shape


@pytest.mark.parametrize(
    "score, f_of_0", [("inverse", 50.0), ("negative", -0.0), ("laplacian", 1.0), ("distance", 0.0)]
)
def test_scores_without_channels(score, f_of_0):
    """E = 0: every distance is an empty sum, 0."""
    query, key = np.empty((2, 33, 0)), np.empty((2, 65, 0))
    assert_identical(l1.l1_scores(query, key, score=score, eps=0.02), np.full((2, 33, 65), f_of_0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_nan_and_infinity(score, dtype):
    """They spread as in the formula: inf - inf is NaN, one inf is a distance of inf."""
    query, key, _ = testing.inputs((33, 65), (31, 65), dtype)
    query[1, 3], query[2, 64], query[3, 0], query[4, 7] = np.inf, -np.inf, np.nan, np.inf
    key[1, 3], key[5, 64], key[6, 33], key[30, 7] = np.inf, np.inf, np.nan, -np.inf
    result = l1.l1_scores(query, key, score=score)
    expected = reference.l1_scores(query, key, score=score).to(query.dtype)
    assert expected.isnan().any()
    assert score in ("inverse", "laplacian") or expected.isinf().any()
    testing.assert_same_special(result, expected)
    testing.Expected(query, key, score=score).assert_scores(result)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_overflow_to_infinity(dtype):
    """A distance beyond the largest number of its dtype is infinity, and the score of infinity is F(inf)."""
    largest = torch.finfo(testing.DTYPES[dtype]).max
    query = torch.full((1, 3), largest, dtype=testing.DTYPES[dtype])
    assert l1.l1_scores(query, -query, score="distance").item() == np.inf
    assert l1.l1_scores(query, -query, score="negative").item() == -np.inf
    assert l1.l1_scores(query, -query, score="laplacian").item() == 0


def test_scores_subnormals_are_not_flushed():
    """The CPU keeps a difference that is below the smallest normal number (a GPU kernel may count it as a tie)."""
    query, key = np.array([[1.5e-38]], np.float32), np.array([[1.25e-38]], np.float32)
    assert_identical(l1.l1_scores(query, key, score="distance"), query - key)


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_scores_numpy_layouts(layout, dtype):
    """Whatever the strides of the arguments, the same bits; none of them is written to."""
    arguments = [to_numpy(array) for array in testing.inputs((3, 33, 17), (3, 31, 17), dtype)[:2]]
    expected = l1.l1_scores(*arguments)
    query, key = (NUMPY_LAYOUTS[layout](array) for array in arguments)
    for pair in ((query, key), (query, arguments[1]), (arguments[0], key)):
        assert_identical(l1.l1_scores(*pair), expected)
    np.testing.assert_array_equal(query, arguments[0])
    np.testing.assert_array_equal(key, arguments[1])


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_torch_layouts(layout, dtype):
    query, key, _ = testing.inputs((3, 33, 17), (3, 31, 17), dtype)
    expected = l1.l1_scores(query, key)
    changed = [TORCH_LAYOUTS[layout](array) for array in (query, key)]
    assert_identical(l1.l1_scores(*changed), expected)


@pytest.fixture
def addresses(monkeypatch):
    """Where the query and the key lie that each kernel is given."""
    seen = []
    launch = threads.launch

    def spy(kernel, workers, query, key, *arguments):
        seen.extend([query.data, key.data])
        launch(kernel, workers, query, key, *arguments)

    monkeypatch.setattr(threads, "launch", spy)
    return seen


@pytest.mark.parametrize("layout", sorted(NUMPY_LAYOUTS.keys() - {"byte-swapped", "unaligned", "field of records"}))
def test_scores_numpy_without_a_copy(layout, addresses):
    """Only numbers that no kernel can read in place are copied: byte-swapped, unaligned, or in records."""
    query, key = (NUMPY_LAYOUTS[layout](np.ones((3, n, 17), np.float32)) for n in (33, 31))
    l1.l1_scores(query, key)
    assert addresses == [array.__array_interface__["data"][0] for array in (query, key)]


@pytest.mark.parametrize("layout", sorted(TORCH_LAYOUTS.keys() - {"negative bit"}))
def test_scores_torch_without_a_copy(layout, addresses):
    query, key = (TORCH_LAYOUTS[layout](torch.ones(3, n, 17, dtype=torch.bfloat16)) for n in (33, 31))
    l1.l1_scores(query, key)
    assert addresses == [query.data_ptr(), key.data_ptr()]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_scores_broadcast(shapes):
    """The same bits as when the batch dimensions are copied out by hand."""
    query, key, grad = testing.inputs(*shapes, "float32")
    batch = grad.shape[:-2]
    copies = [array.expand(*batch, *array.shape[-2:]).contiguous() for array in (query, key)]
    assert_identical(l1.l1_scores(query, key), l1.l1_scores(*copies))
    testing.Expected(query, key).assert_scores(l1.l1_scores(query, key))


def test_scores_expanded():
    """A stride of 0 in the batch, in the rows and in the channels."""
    for dim in range(3):
        query, key, _ = testing.inputs((3, 33, 17), (3, 31, 17), "float32")
        pair = [array.narrow(dim, 0, 1).expand(3, array.shape[1], 17) for array in (query, key)]
        copies = [array.contiguous() for array in pair]
        assert_identical(l1.l1_scores(*pair), l1.l1_scores(*copies))


def test_scores_many_batch_dimensions():
    """More dimensions than strides that could be merged, in an order of memory of their own."""
    query = torch.randn(2, 3, 2, 3, 5, 7).permute(3, 1, 0, 2, 4, 5)
    key = torch.randn(3, 2, 2, 1, 6, 7).permute(0, 3, 2, 1, 4, 5)
    assert_identical(l1.l1_scores(query, key), l1.l1_scores(query.contiguous(), key.contiguous()))
    testing.Expected(query, key).assert_scores(l1.l1_scores(query, key))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_same_bits_wherever_a_row_sits(dtype):
    """A row gives the same bits alone, in another batch entry, and beside other rows."""
    query, key, _ = testing.inputs((5, 97, 65), (5, 129, 65), dtype)
    whole = l1.l1_scores(query, key)
    assert_identical(l1.l1_scores(query, key), whole)
    assert_identical(l1.l1_scores(query.flip(0), key.flip(0)).flip(0), whole)
    assert_identical(l1.l1_scores(query[3], key[3]), whole[3])
    assert_identical(l1.l1_scores(query[3, 40:41], key[3]), whole[3, 40:41])
    assert_identical(l1.l1_scores(query[3], key[3, 90:]), whole[3, :, 90:])


@pytest.mark.parametrize("length_k", [1024, 1000, 1027])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_large_result(dtype, length_k):
    """One that is written past the caches, where rows begin with a cache line, is that of small ones, bit for bit."""
    query, key, _ = testing.inputs((2, 1100, 9), (2, length_k, 9), dtype, ties=True)
    for score in SCORES:
        whole = l1.l1_scores(query, key, score=score)
        assert whole.numel() * whole.element_size() >= scores._PAST_CACHES
        for first in range(0, 1100, 400):
            assert_identical(l1.l1_scores(query[1, first : first + 400], key[1], score=score), whole[1, first:][:400])


def test_scores_symmetric():
    """Exchanging query and key transposes the scores, bit for bit: |a - b| is |b - a|."""
    query, key, _ = testing.inputs((65, 33), (97, 33), "float32")
    assert_identical(l1.l1_scores(query, key), l1.l1_scores(key, query).mT)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_scores_scale_of_numpy_or_int(number):
    """Numbers of every kind are taken for scale and eps."""
    x = np.arange(6.0).reshape(2, 3)
    expected = l1.l1_scores(x, x[:1], scale=float(number), eps=float(number))
    assert_identical(l1.l1_scores(x, x[:1], scale=number, eps=number), expected)
