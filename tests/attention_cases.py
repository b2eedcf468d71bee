"""Calls of attention that are hard to get right, and what must come of numbers that are not finite, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import assert_identical

from l1attn_cupy import testing_attention
from l1attn_cupy.testing import DTYPES
from l1attn_cupy.testing_attention import ExpectedAttention, Inputs

#: Computes out, lse and gradients, as `testing_attention.run`.
Run = Callable[..., list[torch.Tensor]]

NEGATIVE = {"score": "negative", "scale": 0.2}


def _given(dtype: str, length_k: int = 70, **more: Any) -> Inputs:
    return testing_attention.inputs((2, 17, 31), (2, length_k, 31), 33, dtype, **more)


def _masked(dtype: str, number: float, rows: slice) -> tuple[Inputs, dict[str, Any]]:
    """All keys of some queries masked by a number so large that it swallows their scores, or most digits of them."""
    given = _given(dtype)
    mask = torch.zeros(17, 70, dtype=given.query.dtype)
    mask[:, 5] = mask[rows] = number
    lowest = number == torch.finfo(torch.float32).min  # torch's own gradient of logsumexp is wrong there
    return given._replace(mask=mask, grad_lse=None if lowest else given.grad_lse), NEGATIVE


def _nearly_tied(dtype: str, noise: float) -> tuple[Inputs, dict[str, Any]]:
    """One key so near that the softmax is saturated, while F' there is huge: 1e3 to 1e5."""
    given = _given(dtype)
    key = given.key.clone()
    generator = torch.Generator().manual_seed(0)
    key[:, :17] = given.query + noise * torch.randn(2, 17, 31, generator=generator).to(key.dtype)
    return given._replace(key=key), {}


HARD: dict[str, Callable[[str], tuple[Inputs, dict[str, Any]]]] = {
    "all masked by -60000": lambda dtype: _masked(dtype, -60000, slice(None)),
    "rows masked by -60000": lambda dtype: _masked(dtype, -60000, slice(3, 9)),
    "ties": lambda dtype: (_given(dtype, ties=True), {}),
    "ties in all channels but one": lambda dtype: (_given(dtype)._replace(key=_but_one(dtype)), {}),
    "near ties": lambda dtype: _nearly_tied(dtype, 4e-3),
    "nearer ties": lambda dtype: _nearly_tied(dtype, 2e-3),
    "values with an offset": lambda dtype: (_given(dtype)._replace(value=_given(dtype).value + 8), NEGATIVE),
    "rising scores": lambda dtype: (_rising(dtype), NEGATIVE),
    "one query": lambda dtype: (_one_query(dtype), {"score": "laplacian", "scale": 0.25}),
    "long": lambda dtype: (testing_attention.inputs((3, 5), (9011, 5), 7, dtype), NEGATIVE),
}


def _one_query(dtype: str) -> Inputs:
    """The terms of its gradient have a direction in common: their sum grows, and so does the rounding of a long one."""
    return testing_attention.inputs((1, 1, 17), (1, 1500, 17), 16, dtype, ties=True, seed=2)


def _rising(dtype: str) -> Inputs:
    """The largest score of a query rises again and again, by more than what kernels may leave unscaled."""
    given = _given(dtype)
    return given._replace(mask=(torch.arange(70) * 0.5).expand(17, 70).to(given.query.dtype))


def _but_one(dtype: str) -> torch.Tensor:
    given = _given(dtype)
    key = given.key.clone()
    key[:, :17] = given.query
    key[:, :17, 3] += 0.5
    return key


#: Masks that float16 has not.
LARGE_MASKS = {
    f"{kind} masked by {number:.2g}": (number, rows)
    for number in (-1e9, torch.finfo(torch.float32).min)
    for kind, rows in (("all", slice(None)), ("rows", slice(3, 9)))
}
HARD |= {name: lambda dtype, mask=mask: _masked(dtype, *mask) for name, mask in LARGE_MASKS.items()}
CASES = [(name, dtype) for name in HARD for dtype in DTYPES if name not in LARGE_MASKS or dtype == "float32"]


def check_hard(run: Run, name: str, dtype: str, queries: int = 17) -> None:
    """All results are within their bounds, for the first of the ``queries``."""
    given, call = HARD[name](dtype)
    given = given._replace(
        query=given.query[:, :queries],
        mask=None if given.mask is None else given.mask[:queries],
        grad_out=given.grad_out[:, :queries],
        grad_lse=None if given.grad_lse is None else given.grad_lse[..., :queries],
    )
    out, lse, *gradients = run(given, **call)
    expected = ExpectedAttention(*given, **call)
    expected.assert_results(out, lse)
    expected.assert_gradients(*gradients)


def check_nan_in_a_value_of_no_weight(run: Run) -> None:
    """0 times NaN is NaN, also where the weight is 0 because it is too small; wherever among the keys that one is."""
    given = _given("float32")
    for place in (0, 40, 69):
        key, value = given.key.clone(), given.value.clone()
        key[0, place] += 1000
        value[0, place, 3] = torch.nan
        out, _, dquery, dkey, dvalue = run(given._replace(key=key, value=value), **NEGATIVE)
        assert out[0, :, 3].isnan().all()
        assert out[0, :, :3].isfinite().all()
        assert dquery[0].isnan().all()
        assert dkey[0].isnan().all()
        assert all(x[1].isfinite().all() for x in (out, dquery, dkey, dvalue))
        assert dvalue.isfinite().all()


def check_infinite_query(run: Run, mask: torch.Tensor | None = None) -> None:
    """All of its keys are infinitely far away: NaN, as softmax has it, not 0 as where all keys are ruled out."""
    given = _given("float32")._replace(mask=mask)
    query = given.query.clone()
    query[0, 3, 2] = torch.inf
    out, lse, dquery, dkey, dvalue, *_ = run(given._replace(query=query), **NEGATIVE)
    assert out[0, 3].isnan().all()
    assert lse[0, 3].isnan()
    assert all(x[0].isnan().any(-1).all() for x in (dkey, dvalue))
    assert dquery[0, 3].isnan().all()
    clean = run(given, **NEGATIVE)
    others = torch.arange(17) != 3
    for a, b in zip((out, lse, dquery), clean, strict=False):
        assert_identical(a[:, others], b[:, others])


def check_infinite_key(run: Run) -> None:
    """Infinitely far away: of no weight, and other keys are as without it."""
    given = _given("float32")
    key = given.key.clone()
    key[:, 7, 2] = -torch.inf
    infinite = run(given._replace(key=key), **NEGATIVE)
    mask = torch.arange(70) != 7
    without = run(given._replace(mask=mask), **NEGATIVE)
    for a, b in zip(infinite, without, strict=True):
        assert_identical(a, b)
