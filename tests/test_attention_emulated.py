"""The CUDA kernels of attention, run by the emulator, against the formula in float64."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import attention_cases
import pytest
import torch
from cases import BROADCAST, DTYPES, SCORES, TORCH_LAYOUTS, assert_identical, options

import l1attn_cupy as l1
from l1attn_cupy import testing_attention
from l1attn_cupy.cuda import registry
from l1attn_cupy.emulator import engine
from l1attn_cupy.testing_attention import ExpectedAttention, Inputs

NEGATIVE = {"score": "negative", "scale": 0.1}
VARIANTS = sorted({variant.name for variant in registry.variants("attention_forward")})


class Machine(NamedTuple):
    """What runs kernels: a backend, and where its arrays are."""

    backend: str
    device: str

    def run(self, given: Inputs, variant: str | None = None, **call) -> list[torch.Tensor]:
        """out, lse, and the gradients of query, key, value and a mask that is added, on the CPU."""
        results = testing_attention.run(given.to(self.device), backend=self.backend, variant=variant, **call)
        return [x.cpu() for x in results]

    def check(self, given: Inputs, variant: str | None = None, **call) -> None:
        """All results are within their bounds."""
        out, lse, *gradients = self.run(given, variant, **call)
        expected = ExpectedAttention(*given, **call)
        expected.assert_results(out, lse)
        expected.assert_gradients(*gradients)


@pytest.fixture
def machine() -> Machine:
    return Machine("emulator", "cpu")


def test_attention_variants_are_for_both_directions():
    """What ``variant=`` takes in the forward pass, the backward pass gets too, unless it has no such kernel."""
    assert {"gather", "tiled"} == {variant.name for variant in registry.variants("attention_backward")}
    assert set(VARIANTS) == {"gather", "tiled", "stream"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_every_score_and_dtype(machine, variant, score, dtype):
    """Ties and equal rows; more keys, channels and values than one tile of each."""
    given = testing_attention.inputs((5, 33), (65, 33), 17, dtype, ties=True)
    machine.check(given, variant, score=score, scale=0.3, eps=0.02)


def test_attention_emulated_is_emulated(machine):
    """The kernels themselves ran: out and lse; dquery; dkey and dvalue; dmask."""
    before = engine.kernels_executed()
    machine.run(testing_attention.inputs((5, 3), (6, 3), 4, "float32", mask=("added", (6,))))
    assert engine.kernels_executed() == before + (4 if machine.backend == "emulator" else 0)


SIZES = [(1, 1, 1, 1), (1, 33, 31, 129), (3, 32, 129, 2), (2, 31, 0, 5), (2, 97, 17, 0), (7, 0, 5, 3), (0, 7, 5, 3)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_sizes(machine, variant, sizes):
    """L, S, E and Ev around a warp and a block, and 0."""
    length_q, length_k, channels, channels_v = sizes
    given = testing_attention.inputs((2, length_q, channels), (2, length_k, channels), channels_v, "float32")
    machine.check(given, variant, **options("negative", channels))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [(1, 1500), (1500, 9)], ids=str)
def test_attention_emulated_long_sums(machine, variant, lengths):
    """A chain of so many additions rounds more than the formula does: sums are summed in parts."""
    length_q, length_k = lengths
    given = testing_attention.inputs((length_q, 17), (length_k, 17), 16, "float32", ties=True)
    machine.check(given, variant, **options("negative", 17))


MASKS = [
    None,
    ("bool", (9, 40)),
    ("bool", (40,)),
    ("added", (2, 4, 9, 40)),
    ("added", (2, 1, 9, 1)),
    ("added", ()),
]
PLACES = [{}, {"is_causal": True}, {"window": (3, 20)}, {"window": (0, -1)}, {"is_causal": True, "window": (5, 5)}]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_options_in_pairs(machine, variant, mask, place):
    """Every mask with every window, with heads that share a key."""
    number = MASKS.index(mask) + PLACES.index(place)
    given = testing_attention.inputs((2, 4, 9, 17), (2, 2, 40, 17), 5, DTYPES[number % 4], mask=mask, enable_gqa=True)
    machine.check(given, variant, enable_gqa=True, **place, **options(SCORES[number % 3], 17))


SPLIT = [
    ("float32", None, {"is_causal": True}),
    ("float16", ("added", (2, 1, 301)), {"window": (150, 9)}),
    ("bfloat16", ("bool", (2, 301, 1)), {"window": (-1, 40)}),
    ("float64", ("bool", (301, 301)), {"is_causal": True}),
]


@pytest.mark.parametrize("dtype, mask, place", SPLIT, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_splits(machine, variant, dtype, mask, place):
    """Few queries and many keys: blocks share the keys of a query, with masks, windows and shared heads."""
    given = testing_attention.inputs((2, 301, 17), (1, 301, 17), 33, dtype, mask=mask, enable_gqa=True)
    out, lse = _split(machine, variant, given, enable_gqa=True, **NEGATIVE, **place)
    ExpectedAttention(*given, enable_gqa=True, **NEGATIVE, **place).assert_results(out, lse)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_splits_without_a_key(machine, variant):
    """Splits without a key count for nothing, whatever their values are; nor do rows without one."""
    given = testing_attention.inputs((2, 33, 17), (2, 301, 17), 33, "float32", mask=("bool", (33, 301)))
    given.mask[:, :140] = given.mask[5] = False
    given.mask[7, :] = torch.arange(301) == 3
    expected = ExpectedAttention(*given, **NEGATIVE)
    value = given.value.clone()
    value[:, 4:140] = torch.nan
    out, lse = _split(machine, variant, given._replace(value=value), **NEGATIVE)
    expected.assert_results(out, lse)
    assert (out[:, 5] == 0).all()
    assert (lse[:, 5] == -torch.inf).all()


@pytest.mark.parametrize("channels_v", [0, 33])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_many_splits(machine, variant, channels_v):
    """Several warps join the splits of a row; of rows with a query at infinity nothing but NaN comes."""
    given = testing_attention.inputs((3, 5), (2203, 5), channels_v, "float32")
    out, lse = _split(machine, variant, given, **NEGATIVE)
    ExpectedAttention(*given, **NEGATIVE).assert_results(out, lse)
    query = given.query.clone()
    query[1] = torch.inf
    far, lse_far = _split(machine, variant, given._replace(query=query), **NEGATIVE)
    assert far[1].isnan().all()
    assert lse_far[1].isnan()
    assert_identical(far[::2], out[::2])
    assert_identical(lse_far[::2], lse[::2])


def _split(machine, variant, given, **call):
    """out and lse of a call that is split."""
    before = engine.kernels_executed()
    query, key, value, mask, *_ = given.to(machine.device)
    results = l1.l1_attention(
        query, key, value, mask, return_lse=True, backend=machine.backend, variant=variant, **call
    )
    assert engine.kernels_executed() == before + (2 if machine.backend == "emulator" else 0)
    return [x.cpu() for x in results]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_broadcasting(machine, variant, shapes):
    small = [(*shape[:-2], min(shape[-2], 5), 7) for shape in shapes]
    machine.check(testing_attention.inputs(*small, 5, "float64"), variant, scale=0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_key_and_value_broadcast_apart(machine, variant):
    given = testing_attention.inputs((3, 2, 5, 7), (3, 1, 9, 7), 5, "float64")
    machine.check(given._replace(value=torch.randn(2, 9, 5, dtype=torch.float64)), variant, scale=0.2)


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_layouts(machine, variant, layout):
    given = testing_attention.inputs((2, 5, 7), (2, 9, 7), 5, "float32", mask=("added", (2, 5, 9)))
    laid_out = Inputs(*(TORCH_LAYOUTS[layout](x) for x in given))
    for a, b in zip(machine.run(given, variant), machine.run(laid_out, variant), strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_rows_without_a_key(machine, variant):
    """out 0, lse -inf, gradients 0, and NaN in masked keys and values leaves no trace."""
    given = testing_attention.inputs((2, 5, 17), (2, 40, 17), 5, "float32", mask=("bool", (5, 40)))
    given.mask[[0, 3]] = False
    given.mask[:, [2, 39]] = False
    clean = machine.run(given, variant, scale=0.2)
    machine.check(given, variant, scale=0.2)
    assert (clean[0][:, [0, 3]] == 0).all()
    assert (clean[1][:, [0, 3]] == -torch.inf).all()
    key, value = given.key.clone(), given.value.clone()
    key[:, 2], key[:, 39, 3], value[:, 2], value[:, 39] = torch.nan, torch.inf, torch.nan, -torch.inf
    out, lse, *gradients = machine.run(given._replace(key=key, value=value), variant, scale=0.2)
    expected = ExpectedAttention(*given, scale=0.2)
    expected.assert_results(out, lse)
    expected.assert_gradients(*gradients)


@pytest.mark.parametrize("name, dtype", [x for x in attention_cases.CASES if x[0] != "long"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_hard(machine, variant, name, dtype):
    queries = 4 if variant == "stream" else 17  # what it is for; it has no backward pass of its own
    attention_cases.check_hard(functools.partial(machine.run, variant=variant), name, dtype, queries)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_not_finite(machine, variant):
    run = functools.partial(machine.run, variant=variant)
    attention_cases.check_nan_in_a_value_of_no_weight(run)
    attention_cases.check_infinite_query(run)
    attention_cases.check_infinite_query(run, torch.zeros(17, 70))
    attention_cases.check_infinite_key(run)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_same_bits_in_every_run(machine, variant):
    """The emulator runs the threads in another order each time."""
    given = testing_attention.inputs((5, 33), (65, 33), 17, "float32")
    for a, b in zip(machine.run(given, variant), machine.run(given, variant), strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_emulated_varlen(machine, variant):
    """Each sequence as if it were alone, also those without queries or keys."""
    lengths = (5, 0, 1, 7), (4, 3, 0, 9)
    ends = [[0, *itertools.accumulate(n)] for n in lengths]
    arrays = [
        torch.randn(end[-1], 2, c, requires_grad=True) for end, c in zip((*ends, ends[1]), (7, 7, 5), strict=True)
    ]
    own = {"scale": 0.3, "is_causal": True, "return_lse": True}
    results = []
    for backend, device, name in (("cpu", "cpu", None), (*machine, variant)):
        out, lse = l1.l1_attention_varlen(*(x.to(device) for x in arrays), *ends, backend=backend, variant=name, **own)
        results.append([out.cpu(), lse.cpu(), *torch.autograd.grad(out.pow(2).sum(), arrays)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_emulated_variant_of_the_forward_alone(machine, tmp_path, monkeypatch):
    """One's own forward kernel trains with the backward kernels that there are."""
    text = (registry.packaged_folder() / "attention_forward_gather.cu").read_text()
    (tmp_path / "attention_forward_mine.cu").write_text(text)
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path))
    given = testing_attention.inputs((3, 4), (5, 4), 2, "float32", mask=("added", (5,)))
    leaves = [x.to(machine.device).requires_grad_() for x in given[:4]]
    results = []
    for variant in ("mine", "gather"):
        out = l1.l1_attention(*leaves, backend=machine.backend, variant=variant)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert_identical(*(out.detach().cpu() for out, *_ in results))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_emulated_unknown_variant(machine):
    x = torch.zeros(3, 4, device=machine.device)
    known = "'gather', 'stream', 'tiled'"
    with pytest.raises(ValueError, match=f"variant must be None or one of {known} for attention_forward, got 'flash'"):
        l1.l1_attention(x, x, x, backend=machine.backend, variant="flash")
