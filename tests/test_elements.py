"""The conversions and the exp inside the CPU kernels, against torch's conversions and float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

import l1attn_cupy as l1
from l1attn_cupy.cpu import elements

EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
EXP_ULP = 1.0  # as the docstring of cpu.elements says


@numba.njit
def widen_halves(bits, values):
    for i in range(bits.size):
        values[i] = elements.half_to_float(np.uint32(bits[i]))


@numba.njit
def narrow(values, halves, bfloats):
    for i in range(values.size):
        halves[i] = elements.float_to_half(values[i])
        bfloats[i] = elements.float_to_bfloat(values[i])


@numba.njit(error_model="numpy")
def exp_of(values, results):
    for i in range(values.size):
        results[i] = elements.exp(values[i])


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a 16-bit dtype."""
    return torch.from_numpy(EVERY_16_BITS.view(np.int16)).view(dtype)


def hard_to_round(dtype: torch.dtype) -> np.ndarray:
    """float32 numbers around every number of a 16-bit dtype and around every halfway point, and random ones."""
    finite = all_values(dtype).float()
    finite = finite[finite.isfinite()].sort().values.double()
    halfway = (finite[1:] + finite[:-1]) / 2
    beyond = torch.tensor([torch.finfo(dtype).max * factor for factor in (1.0002, 1.0005, 1.004, 1.1)])
    centres = torch.cat([finite, halfway, beyond, -beyond]).float().numpy()
    near = [centres, np.nextafter(centres, np.float32(np.inf)), np.nextafter(centres, np.float32(-np.inf))]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45, 3.4e38], np.float32)
    return np.concatenate([*near, random, special])


def test_half_to_float_every_pattern():
    """Exact for all 65536, subnormals, infinities and NaN included."""
    values = np.empty(EVERY_16_BITS.size, np.float32)
    widen_halves(EVERY_16_BITS, values)
    expected = all_values(torch.float16).float().numpy()
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), nan)
    np.testing.assert_array_equal(values.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float_to_16_bits_rounds_to_nearest_even(dtype):
    """Halfway cases, overflow, subnormals and NaN as torch rounds them."""
    values = hard_to_round(dtype)
    results = {torch.float16: np.empty(values.size, np.uint16), torch.bfloat16: np.empty(values.size, np.uint16)}
    narrow(values, results[torch.float16], results[torch.bfloat16])
    expected = torch.from_numpy(values).to(dtype)
    nan = expected.isnan().numpy()
    result = torch.from_numpy(results[dtype].view(np.int16)).view(dtype)
    np.testing.assert_array_equal(result.isnan().numpy(), nan)
    np.testing.assert_array_equal(results[dtype][~nan], bits_of(expected)[~nan])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_16_bits_in_and_out(dtype):
    """The distance from 0 is the absolute value: every number is loaded and stored exactly."""
    values = all_values(dtype)
    zero = torch.zeros(1, 1, dtype=dtype)
    result = l1.l1_scores(values[:, None], zero, score="distance")[:, 0]
    nan = values.isnan()
    assert torch.equal(result.isnan(), nan)
    np.testing.assert_array_equal(bits_of(result)[~nan], bits_of(values.abs())[~nan])


def test_exp_float32_within_its_ulp():
    """Every 509th of the floats from -105 to 88, and all of those from -1.0001 to -0.9999 and from -0.1 / 2**20."""
    sparse = [np.arange(0, np.array([end], np.float32).view(np.uint32)[0] + 1, 509) for end in (88.0, 105.0)]
    positive, negative = (bits.astype(np.uint32).view(np.float32) for bits in sparse)
    ends = np.array([0.9999, 1.0001], np.float32).view(np.uint32)
    dense = np.arange(ends[0], ends[1], dtype=np.uint32).view(np.float32)
    x = np.concatenate([positive, -negative, dense, -dense])
    result = np.empty_like(x)
    exp_of(x, result)
    exact = np.exp(x.astype(np.float64))
    with np.errstate(under="ignore"):
        ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    errors = np.abs(result - exact) / ulp
    assert errors.max() <= EXP_ULP, f"{errors.max():.3f} ulp at {x[errors.argmax()]!r}"


def test_exp_float32_special_values():
    x = np.array([0.0, -0.0, -np.inf, -1e30, -104.5, np.nan], np.float32)
    result = np.empty_like(x)
    exp_of(x, result)
    np.testing.assert_array_equal(result, np.array([1, 1, 0, 0, 0, np.nan], np.float32))
