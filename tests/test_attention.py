"""`l1_attention` and its gradients against the formula in float64."""

from __future__ import annotations

import itertools

import attention_cases
import numpy as np
import pytest
import torch
from cases import BROADCAST, DTYPES, LENGTHS, NUMPY_LAYOUTS, SCORES, TORCH_LAYOUTS, assert_identical, options, to_numpy

import l1attn_cupy as l1
from l1attn_cupy import plan, plan_attention, reference, testing_attention
from l1attn_cupy.cpu import attention_backend, threads, vector_attention
from l1attn_cupy.cpu.jit import kernel
from l1attn_cupy.cpu.vector import all_finite, lanes
from l1attn_cupy.testing_attention import ExpectedAttention, Inputs


def check(given: Inputs, **call) -> None:
    """Results and all gradients of one call are within their bounds."""
    out, lse, *gradients = testing_attention.run(given, **call)
    expected = ExpectedAttention(*given, **call)
    expected.assert_results(out, lse)
    expected.assert_gradients(*gradients)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_odd_sizes(lengths):
    """No size is a multiple of a block: the last block of rows, keys and channels is a part of one."""
    length_q, length_k, channels = lengths
    which = LENGTHS.index(lengths)
    channels_v = lengths[which % 3] + which % 2
    for dtype in ("float32", DTYPES[which // 2 % 4]):
        given = testing_attention.inputs((2, length_q, channels), (2, length_k, channels), channels_v, dtype)
        check(given, is_causal=which % 5 == 0, **options(SCORES[which % 4], channels))


@pytest.mark.parametrize("ties", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_attention_every_score_and_dtype(score, dtype, ties):
    given = testing_attention.inputs((3, 33, 31), (3, 65, 31), 17, dtype, ties=ties)
    check(given, score=score, scale=0.3, eps=0.02)


MASKS = {
    "no mask": {},
    "bool": {"mask": ("bool", (33, 70))},
    "bool for each key": {"mask": ("bool", (70,))},
    "bool for each head and query": {"mask": ("bool", (4, 33, 1))},
    "added": {"mask": ("added", (33, 70))},
    "added to each head": {"mask": ("added", (2, 4, 33, 70))},
    "added for each key": {"mask": ("added", (2, 1, 1, 70))},
    "added for each query": {"mask": ("added", (4, 33, 1))},
    "added to all": {"mask": ("added", ())},
}
PLACES = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"window": (5, 20)},
    "window to the left": {"window": (0, -1)},
    "causal window": {"is_causal": True, "window": (40, 9)},
}
HEADS = {"heads": ((2, 4, 33, 17), (2, 4, 70, 17)), "shared heads": ((2, 4, 33, 17), (2, 2, 70, 17))}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_options_in_pairs(mask, place, heads):
    """Every mask with every window and with heads that share a key; dtype and score go round."""
    number = [list(x).index(y) for x, y in ((MASKS, mask), (PLACES, place), (HEADS, heads))]
    dtype, score = DTYPES[sum(number) % 4], SCORES[(number[0] + number[1] // 2) % 4]
    gqa = {"enable_gqa": heads == "shared heads"}
    given = testing_attention.inputs(*HEADS[heads], 5, dtype, **MASKS[mask], **gqa)
    check(given, **PLACES[place], **gqa, **options(score, 17))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_softmax_of_scores(dtype):
    """The fused result replaces the three steps, within the bound of either."""
    given = testing_attention.inputs((2, 65, 33), (2, 97, 33), 20, dtype, mask=("added", (65, 97)))
    scores = l1.l1_scores(*(x.double() for x in given[:2])) + given.mask.double()
    out = (torch.softmax(scores, -1) @ given.value.double()).to(given.query.dtype)
    expected = ExpectedAttention(*given)
    expected.assert_results(out)
    expected.assert_results(l1.l1_attention(*given[:4]))


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_attention_broadcasting(shapes):
    """A gradient is summed over the dimensions in which its array was broadcast."""
    check(testing_attention.inputs(*shapes, 5, "float64"), scale=0.2)


def test_attention_key_and_value_broadcast_apart():
    """Their gradients have other sums, and so are computed apart."""
    given = testing_attention.inputs((3, 2, 33, 17), (3, 1, 31, 17), 5, "float64")
    check(given._replace(value=torch.randn(2, 31, 5, dtype=torch.float64)), scale=0.2)
    check(given._replace(value=torch.randn(31, 5, dtype=torch.float64)), scale=0.2)


def test_attention_value_with_more_batches():
    """Only value has them: one softmax for all."""
    given = testing_attention.inputs((33, 17), (31, 17), 5, "float64")
    value, grad = (torch.randn(3, n, 5, dtype=torch.float64) for n in (31, 33))
    check(given._replace(value=value, grad_out=grad, grad_lse=torch.zeros(3, 33, dtype=torch.float64)), scale=0.2)


@pytest.mark.parametrize("length_q, length_k", [(1, 4097), (3, 5000), (1, 600), (20, 3000)])
@pytest.mark.parametrize("place", ["all", "window"])
def test_attention_keys_in_parts(length_q, length_k, place):
    """Decoding: the keys are split among tasks, and their parts joined."""
    given = testing_attention.inputs((2, length_q, 17), (2, length_k, 17), 20, "float32")
    call = attention_backend._parts
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_backend, "_parts", lambda plan: counted.append(call(plan)) or counted[-1])
        check(given, window=(2000, 2500) if place == "window" else None, **options("negative", 17))
    assert (counted[0] > 1) == (length_k >= 1024)


def test_attention_parts_without_a_key():
    """Some parts of the keys, or all, are ruled out by a mask."""
    given = testing_attention.inputs((2, 1, 17), (2, 4097, 17), 20, "float32")
    mask = torch.zeros(2, 1, 4097, dtype=torch.bool)
    mask[0, 0, 3000:3010] = True
    out, lse = l1.l1_attention(*given[:3], mask, return_lse=True)
    ExpectedAttention(*given[:3], mask).assert_results(out, lse)
    assert lse[1] == -torch.inf
    assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bool", "added"])
def test_attention_rows_without_a_key(mask, dtype):
    """out 0, lse -inf, gradients 0; never NaN."""
    given = testing_attention.inputs((2, 33, 17), (2, 70, 17), 5, dtype, mask=("bool", (33, 70)))
    given.mask[[0, 7, 32]] = False
    given.mask[:, 3] = False
    if mask == "added":
        added = torch.zeros(33, 70, dtype=given.query.dtype).masked_fill(~given.mask, -torch.inf)
        given = given._replace(mask=added)
    call = {"scale": 0.2}
    out, lse = l1.l1_attention(*given[:4], return_lse=True, **call)
    assert (out[:, [0, 7, 32]] == 0).all()
    assert (lse[:, [0, 7, 32]] == -torch.inf).all()
    check(given, **call)
    dquery, dkey, dvalue = l1.l1_attention_backward(given.grad_out, *given[:3], out, lse, given.mask, **call)
    assert (dquery[:, [0, 7, 32]] == 0).all()
    assert (dkey[:, 3] == 0).all()
    assert (dvalue[:, 3] == 0).all()


def test_attention_window_beyond_all_keys():
    """Queries far after the last key have none."""
    given = testing_attention.inputs((70, 17), (33, 17), 5, "float32")
    lse = l1.l1_attention(*given[:3], window=(3, 3), return_lse=True)[1]
    assert torch.equal(lse == -torch.inf, torch.arange(70) > 35)
    check(given, window=(3, 3))


@pytest.mark.parametrize(
    "shapes, channels_v",
    [
        (((0, 5, 3), (0, 7, 3)), 4),
        (((2, 0, 3), (2, 7, 3)), 4),
        (((2, 5, 3), (2, 0, 3)), 4),
        (((2, 5, 0), (2, 7, 0)), 4),
        (((2, 5, 3), (2, 7, 3)), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_attention_empty(shapes, channels_v, library):
    """No batch, no query, no key, no channels of either kind."""
    given = testing_attention.inputs(*shapes, channels_v, "float32")
    check(given)
    arrays = [to_numpy(x) for x in given[:3]] if library == "numpy" else given[:3]
    out, lse = l1.l1_attention(*arrays, return_lse=True)
    assert type(out) is type(lse) is type(arrays[0])
    assert out.shape == given.grad_out.shape
    if shapes[1][-2] == 0:
        assert (out == 0).all()
        assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_masked_keys_may_hold_anything(dtype):
    """NaN and infinity in keys and values that are ruled out leave no trace in any result."""
    given = testing_attention.inputs((2, 33, 17), (2, 70, 17), 5, dtype)
    mask = torch.ones(33, 70, dtype=torch.bool)
    mask[:, [5, 69]] = False
    query, key, value, _, grad_out, grad_lse = given
    clean = [*l1.l1_attention(query, key, value, mask, return_lse=True, scale=0.2)]
    clean += l1.l1_attention_backward(grad_out, query, key, value, *clean, mask, grad_lse=grad_lse, scale=0.2)
    key, value = key.clone(), value.clone()
    key[:, 5], key[:, 69, 3], value[:, 5], value[:, 69] = torch.nan, torch.inf, torch.nan, -torch.inf
    for masking in (mask, torch.zeros(33, 70, dtype=query.dtype).masked_fill(~mask, -torch.inf)):
        dirty = [*l1.l1_attention(query, key, value, masking, return_lse=True, scale=0.2)]
        dirty += l1.l1_attention_backward(grad_out, query, key, value, *dirty, masking, grad_lse=grad_lse, scale=0.2)
        for result, expected in zip(dirty, clean, strict=True):
            assert_identical(result, expected)


def test_attention_values_after_the_present_may_hold_anything():
    """As with a cache whose rest was never written: what comes after a query is not seen, within its tile either."""
    given = testing_attention.inputs((33, 17), (70, 17), 5, "float32")
    query, key, value = given[:3]
    expected = l1.l1_attention(query, key, value, is_causal=True)
    key, value = key.clone(), value.clone()
    key[20:], value[20:] = torch.nan, torch.inf
    result = l1.l1_attention(query, key, value, is_causal=True)
    assert_identical(result[:20], expected[:20])
    assert not result[20:].isfinite().any()


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("score", SCORES)
def test_attention_nan_and_infinity(where, score):
    """They spread as in the formula, and to no other row."""
    given = testing_attention.inputs((2, 33, 17), (2, 31, 17), 5, "float64")
    getattr(given, where)[0, 7, 3] = torch.nan if where != "value" else torch.inf
    out, lse = l1.l1_attention(*given[:3], score=score, scale=0.2, return_lse=True)
    expected = reference.l1_attention(*given[:3], score=score, scale=0.2)
    assert not expected[0].isfinite().all()
    ExpectedAttention(*given[:3], score=score, scale=0.2).assert_results(out, lse)


@pytest.mark.parametrize("name, dtype", attention_cases.CASES)
def test_attention_hard(name, dtype):
    """Where a rounded log-sum-exp or a rounded out would leave little of the gradients."""
    attention_cases.check_hard(testing_attention.run, name, dtype)


def test_attention_nan_in_a_value_of_no_weight():
    attention_cases.check_nan_in_a_value_of_no_weight(testing_attention.run)


@pytest.mark.parametrize("mask", [None, torch.zeros(17, 70), torch.ones(70, dtype=torch.bool)], ids=str)
def test_attention_infinite_query(mask):
    attention_cases.check_infinite_query(testing_attention.run, mask)


def test_attention_infinite_key():
    attention_cases.check_infinite_key(testing_attention.run)


def test_attention_infinite_query_and_keys_in_parts():
    """NaN only if the keys of all parts are infinitely far away."""
    query, key, value = torch.zeros(2, 1, 3), torch.zeros(2, 4097, 3), torch.randn(2, 4097, 5)
    key[0], key[1, 1024:] = torch.inf, torch.inf
    out, lse = l1.l1_attention(query, key, value, score="negative", return_lse=True)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    torch.testing.assert_close(out[1, 0], value[1, :1024].mean(0))


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
def test_attention_numpy_layouts(layout):
    given = testing_attention.inputs((2, 33, 17), (2, 31, 17), 5, "float32", mask=("added", (2, 33, 31)))
    plain = [to_numpy(x) for x in given]
    laid_out = [NUMPY_LAYOUTS[layout](x) for x in plain]
    results = [[*l1.l1_attention(*arrays[:4], return_lse=True)] for arrays in (plain, laid_out)]
    for (out, lse), arrays in zip(results, (plain, laid_out), strict=True):
        found = (NUMPY_LAYOUTS[layout](x) for x in (out, lse)) if arrays is laid_out else (out, lse)
        results[arrays is laid_out] += l1.l1_attention_backward(
            arrays[4], *arrays[:3], *found, arrays[3], grad_lse=arrays[5], return_dmask=True
        )
    for a, b in zip(*results, strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_torch_layouts(layout, dtype):
    given = testing_attention.inputs((2, 33, 17), (2, 31, 17), 5, dtype, mask=("added", (2, 33, 31)))
    change = TORCH_LAYOUTS[layout]
    laid_out = [change(x) for x in given]
    results = []
    for arrays in (given, laid_out):
        out, lse = l1.l1_attention(*arrays[:4], return_lse=True)
        saved = (change(out), change(lse)) if arrays is laid_out else (out, lse)
        gradients = l1.l1_attention_backward(
            arrays[4], *arrays[:3], *saved, arrays[3], grad_lse=arrays[5], return_dmask=True
        )
        results.append([out, lse, *gradients])
    for a, b in zip(*results, strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("mask", ["bool", "added"])
def test_attention_expanded_mask(mask):
    """Stride 0 instead of a dimension of 1: the same bits, and a gradient of the expanded shape."""
    given = testing_attention.inputs((2, 33, 17), (2, 31, 17), 5, "float64", mask=(mask, (31,)))
    expanded = given.mask.expand(2, 33, 31)
    assert_identical(l1.l1_attention(*given[:4]), l1.l1_attention(*given[:3], expanded))
    check(given._replace(mask=expanded))


@pytest.fixture
def one_pass(monkeypatch):
    """All gradients from one pass, with dquery summed in three parts, though there is little to do."""
    monkeypatch.setattr(attention_backend, "_summed_in", lambda plan, wanted: 3)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gradients_in_one_pass(one_pass, dtype, place):
    """More blocks of keys than parts, and fewer; with ties."""
    for length_k, number in ((517, 3), (70, 1)):
        mask = ("added", (33, length_k)) if number == 3 else ("bool", (length_k,))
        given = testing_attention.inputs((2, 33, 17), (2, length_k, 17), 5, dtype, mask=mask, ties=number == 1)
        check(given, scale=0.3, eps=0.02, **PLACES[place])


def test_attention_gradients_in_one_pass_of_two(one_pass):
    """Value may need no gradient."""
    given = testing_attention.inputs((2, 33, 17), (2, 70, 17), 5, "float64")
    leaves = [given.query.requires_grad_(), given.key.requires_grad_()]
    gradients = torch.autograd.grad(l1.l1_attention(*leaves, given.value), leaves, given.grad_out)
    expected = ExpectedAttention(*given[:3], grad_out=given.grad_out)
    expected.assert_gradients(*gradients)


def test_attention_gradients_in_one_pass_not_finite(one_pass):
    attention_cases.check_nan_in_a_value_of_no_weight(testing_attention.run)
    attention_cases.check_infinite_query(testing_attention.run)
    attention_cases.check_infinite_key(testing_attention.run)


@pytest.mark.parametrize(
    "query_shape, key_shape, wanted, parts",
    [
        ((8, 1024, 64), (8, 1024, 64), "query key value", 8),
        ((2, 16, 200, 64), (2, 16, 200, 64), "query key", 2),
        ((64, 100, 64), (64, 100, 64), "query key", 1),
        ((8, 1024, 64), (8, 1024, 64), "query value", 0),
        ((4, 1024, 64), (4, 1024, 64), "query key value", 0),
        ((8, 1024, 64), (8, 800, 64), "query key value", 0),
        ((8, 1024, 64), (1024, 64), "query key value", 0),
        ((64, 65536, 64), (64, 65536, 64), "query key value", 0),
    ],
)
def test_attention_gradients_in_one_pass_where_it_pays(query_shape, key_shape, wanted, parts):
    """Enough tasks without many parts, nothing broadcast, and little memory; whatever the number of threads."""
    like = plan.ArraySpec("torch", (1, 1), (1, 1), "float32", "cpu")
    query, key = (plan.contiguous(like, shape) for shape in (query_shape, key_shape))
    options = plan_attention.option_types(False, False, None, "inverse", 1.0, 1e-3, None, None)
    call = plan_attention.attention([query, key, key, None], options)
    assert attention_backend._summed_in(call, (f"d{name}" for name in wanted.split())) == parts


@pytest.mark.parametrize("n", [1, 2])
def test_attention_same_bits_for_any_number_of_threads(n):
    """Also where the keys are split, and where only some tiles are computed."""
    results = []
    before = torch.get_num_threads()
    for count in (n, 3):
        torch.set_num_threads(count)
        found = []
        try:
            for shapes, call in (
                (((2, 300, 64), (2, 500, 64)), {}),
                (((300, 64), (500, 64)), {"is_causal": True}),
                (((1, 64), (9000, 64)), {}),
                (((32, 100, 5), (32, 200, 5)), {"is_causal": True}),
            ):
                given = testing_attention.inputs(*shapes, 64, "float32", mask=("added", (shapes[1][-2],)))
                out, lse = l1.l1_attention(*given[:4], return_lse=True, **call)
                found += [out, lse]
                found += l1.l1_attention_backward(
                    given.grad_out, *given[:3], out, lse, given.mask, return_dmask=True, **call
                )
        finally:
            torch.set_num_threads(before)
        results.append(found)
    for a, b in zip(*results, strict=True):
        assert_identical(a, b)


def test_attention_row_does_not_depend_on_its_batch():
    """The same bits alone and in a batch, whose blocks are larger."""
    given = testing_attention.inputs((40, 65, 17), (40, 97, 17), 5, "float32")
    together = l1.l1_attention(*given[:3], is_causal=True)
    alone = l1.l1_attention(*(x[7:8] for x in given[:3]), is_causal=True)
    assert_identical(together[7:8], alone)


def test_attention_skips_what_is_ruled_out():
    """Causal work is a half, a window's is linear: tasks list only the tiles that have to be computed."""
    given = testing_attention.inputs((4096, 4), (4096, 4), 4, "float32")
    terms = []
    with pytest.MonkeyPatch.context() as patch:
        real = attention_backend._work

        def spy(*arguments, **named):
            table = real(*arguments, **named)
            terms.append(int((table[:, 1] * (table[:, 3] - table[:, 2])).sum()))
            return table

        patch.setattr(attention_backend, "_work", spy)
        for call in ({"scale": 0.11}, {"scale": 0.11, "is_causal": True}, {"scale": 0.11, "window": (64, 64)}):
            l1.l1_attention(*given[:3], **call)
    full, causal, window = terms[1], terms[3], terms[5]
    assert full == 4096 * 4096
    assert causal < 0.53 * full
    assert window < 0.1 * full


@pytest.mark.parametrize("runs", [1, 2, 3, 8, 64])
def test_attention_runs_share_causal_work_evenly(runs):
    """Static shares: the largest is at most 6 % above the mean at length 4096 (one thread has several runs)."""
    side = attention_backend._Side(np.array([[0, 4096, 0, 4096]]), 0, 1 << 40)
    table = attention_backend._work(side, 64, 1)
    cost = table[:, 1] * (table[:, 3] - table[:, 2])
    shares = [0] * runs
    for turn, run in itertools.product(range(-(-len(cost) // runs)), range(runs)):
        task = turn * runs + (run if turn % 2 == 0 else runs - 1 - run)
        shares[run] += int(cost[task]) if task < len(cost) else 0
    assert sum(shares) == cost.sum()
    assert runs == 64 or max(shares) <= 1.06 * sum(shares) / runs


@kernel()
def _all_finite(rows, count):
    return all_finite(rows, count)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_finite_at_every_place(dtype):
    """Of rows one to seven registers long; beyond ``count`` there may be anything."""
    step = lanes(np.dtype(dtype).itemsize)
    for columns, number in itertools.product((step, 3 * step, 7 * step), (np.nan, np.inf, -np.inf)):
        rows = np.full((3, columns), np.finfo(dtype).max, dtype)
        rows[2] = np.nan
        assert _all_finite(rows, 2)
        assert not _all_finite(rows, 3)
        for place in np.ndindex(2, columns):
            kept, rows[place] = rows[place], number
            assert not _all_finite(rows, 2)
            rows[place] = kept


@kernel()
def _exp_of(tile, rows, largest, total, factors):
    vector_attention.softmax_step(tile, rows, largest, total, factors, 0)


@pytest.mark.parametrize("dtype, lowest", [("float32", -87.3), ("float64", -708.3)])
def test_attention_exp_error(dtype, lowest):
    """The vector exp against a wider one, over a million numbers of the range that softmax has."""
    width = vector_attention.panel_width(np.dtype(dtype).itemsize)
    x = np.concatenate([[0.0, -0.0, -1e-10, lowest * 2, -np.inf, -1e-30, -5, -1], np.linspace(lowest, 0, 1 << 20)])
    rows = x.size // width
    x = x[: rows * width].astype(dtype)
    tile = np.zeros((rows + vector_attention._GROUP, width), dtype)  # a group may pass the last row
    tile[:rows] = x.reshape(rows, width)
    largest, total, factors = (np.full(width, number, dtype) for number in (0, 0, 1))
    _exp_of(tile, rows, largest, total, factors)
    result, exact = tile[:rows].ravel(), np.exp(x.astype(np.longdouble))
    normal = exact >= np.finfo(dtype).tiny
    ulps = np.abs(result[normal] - exact[normal]) / np.spacing(exact[normal].astype(dtype))
    assert ulps.max() <= 1.1
    assert (result[~normal] <= np.finfo(dtype).tiny).all()
    assert (result[x == -np.inf] == 0).all()
    assert (factors == 1).all()


def test_attention_varlen_new_lengths_need_no_new_plan():
    """The checks of arrays and options are kept, and nothing of the lengths is, which are others in every call."""
    x = torch.randn(300, 2, 5)
    lengths = [torch.tensor([0, n, 2 * n, 300]) for n in range(1, 100)]
    l1.l1_attention_varlen(x, x, x, lengths[0], lengths[0])
    before = plan_attention._attention.cache_info()
    for ends in lengths[1:]:
        l1.l1_attention_varlen(x, x, x, ends, ends)
    after = plan_attention._attention.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 98)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("band", [(-(1 << 40), 1 << 40), (0, 1 << 40), (-3, 40)])
def test_attention_work_covers_every_pair_once(band, parts):
    """Of each sequence, also those without queries or keys."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 200, (2, 20)) * (rng.random((2, 20)) > 0.2)
    (q, end_q), (k, end_k) = ((np.cumsum(n) - n, np.cumsum(n)) for n in lengths)
    table = attention_backend._work(attention_backend._Side(np.stack([q, end_q, k, end_k], -1), *band), 48, parts)
    for start, rows, first, last, offset, _ in table:
        (own,) = ((q <= start) & (start + rows <= end_q)).nonzero()[0]
        assert offset == k[own] - q[own]
        assert first == last or k[own] <= first < last <= end_k[own]
    counted = np.zeros((end_q[-1], end_k[-1]), int)
    for start, rows, first, last, *_ in table:
        counted[start : start + rows, first:last] += 1
    assert counted.max() == 1
    for n in range(20):
        i, j = np.ogrid[: lengths[0, n], : lengths[1, n]]
        wanted = (i - j >= band[0]) & (i - j <= band[1])
        assert (counted[q[n] : end_q[n], k[n] : end_k[n]][wanted] == 1).all()


def test_attention_small_call_has_one_thread():
    given = testing_attention.inputs((9, 4), (9, 4), 4, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_threads", None)  # starting threads would fail
        l1.l1_attention(*given[:3])


class TestVarlen:
    """`l1_attention_varlen`: each sequence as if it were alone."""

    LENGTHS_Q = (33, 0, 1, 70, 5)
    LENGTHS_K = (31, 7, 129, 0, 5)

    def packed(self, dtype="float64", heads_k=4):
        sizes = sum(self.LENGTHS_Q), sum(self.LENGTHS_K)
        query = torch.randn(sizes[0], 4, 17, dtype=torch.float64)
        key, value = (torch.randn(sizes[1], heads_k, n, dtype=torch.float64) for n in (17, 5))
        ends = [
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (self.LENGTHS_Q, self.LENGTHS_K)
        ]
        return [x.to(getattr(torch, dtype)).requires_grad_() for x in (query, key, value)], ends

    def one_by_one(self, arrays, ends, **call):
        outs, lses = [], []
        for n in range(len(self.LENGTHS_Q)):
            q, k = (slice(int(end[n]), int(end[n + 1])) for end in ends)
            own = (x[rows].transpose(0, 1) for x, rows in zip(arrays, (q, k, k), strict=True))
            out, lse = l1.l1_attention(*own, return_lse=True, **call)
            outs.append(out.transpose(0, 1))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, -1)

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("heads_k", [4, 2])
    def test_each_sequence_alone(self, place, heads_k):
        arrays, ends = self.packed(heads_k=heads_k)
        call = {**PLACES[place], "enable_gqa": heads_k == 2, "scale": 0.3}
        out, lse = l1.l1_attention_varlen(*arrays, *ends, return_lse=True, **call)
        expected = self.one_by_one(arrays, ends, **call)
        assert out.is_contiguous()
        assert_identical(out, expected[0])
        assert_identical(lse, expected[1])
        grad = torch.randn_like(out)
        live = torch.isfinite(lse)
        gradients = [
            torch.autograd.grad([o, s[live]], arrays, [grad, torch.ones_like(s[live])])
            for o, s in ((out, lse), expected)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_decoding_with_keys_in_parts(self):
        """One query a sequence against keys of other lengths, which are split among tasks."""
        query, key = torch.randn(3, 2, 17), torch.randn(6000, 2, 17)
        ends = [0, 1, 2, 3], [0, 3000, 3010, 6000]
        out, lse = l1.l1_attention_varlen(query, key, key, *ends, return_lse=True)
        for n in range(3):
            rows = slice(ends[1][n], ends[1][n + 1])
            alone = [x.transpose(0, 1) for x in (query[n : n + 1], key[rows], key[rows])]
            expected = ExpectedAttention(*alone)
            expected.assert_results(out[n : n + 1].transpose(0, 1), lse[:, n : n + 1])

    @pytest.mark.parametrize("kind", ["numpy", "list", "int64 tensor"])
    def test_lengths_of_every_kind(self, kind):
        arrays, ends = self.packed("float32")
        arrays = [x.detach() for x in arrays]
        expected = l1.l1_attention_varlen(*arrays, *ends)
        if kind == "numpy":
            result = l1.l1_attention_varlen(*(x.numpy() for x in arrays), *(x.numpy() for x in ends))
            assert isinstance(result, np.ndarray)
            assert result.flags.c_contiguous
        else:
            result = l1.l1_attention_varlen(*arrays, *(x.tolist() if kind == "list" else x.long() for x in ends))
        assert_identical(result, expected)
