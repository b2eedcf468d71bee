"""The CUDA kernels one by one, for whatever can run them: which there are, how to call one, how far off it may be."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from cases import LENGTHS

import l1attn_cupy as l1
from l1attn_cupy import testing
from l1attn_cupy.cuda import registry
from l1attn_cupy.cuda.registry import Variant


class Kernel(NamedTuple):
    """A ``@variant`` line and one of its dtypes."""

    variant: Variant
    dtype: str

    def __str__(self) -> str:
        return f"{self.variant.name}:{self.variant.line}-{self.dtype}"

    def takes(self, length_q: int, length_k: int, channels: int) -> bool:
        """Whether a call by this variant's name with these sizes comes to this line of its file."""
        sizes = {"q": length_q, "k": length_k, "e": channels}
        candidates = [v for v in registry.variants(self.variant.op) if v.name == self.variant.name]
        return next((v for v in candidates if v.fits(self.dtype, sizes)), None) == self.variant

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """The sizes (L, S, E) of `LENGTHS` that come to this line: all in float32, half of them in other dtypes."""
        found = [s for s in LENGTHS[:: 1 if self.dtype == "float32" else 2] if self.takes(*s)]
        assert found, f"no call comes to {self}"
        return found

    @property
    def length_q(self) -> int:
        """A number of queries that comes to this line."""
        return next(length for length in (33, 97) if self.takes(length, 65, 64))

    @property
    def deterministic(self) -> bool:
        return not self.variant.atomic


KERNELS = [Kernel(variant, dtype) for variant in registry.variants() for dtype in variant.dtypes]


def each(op: str, deterministic: bool = False):
    """Parametrize ``kernel`` with all kernels of an op, or with those that give the same bits in every run."""
    found = [k for k in KERNELS if k.variant.op == op and (k.deterministic or not deterministic)]
    return pytest.mark.parametrize("kernel", found, ids=str)


class Machine(NamedTuple):
    """What runs kernels: a backend, and where its arrays are."""

    backend: str
    device: str

    def scores(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, **options: Any) -> torch.Tensor:
        """By this very kernel, from arrays anywhere; the result is on the CPU."""
        assert kernel.takes(query.shape[-2], key.shape[-2], query.shape[-1])
        result = l1.l1_scores(*self.own(query, key), backend=self.backend, variant=kernel.variant.name, **options)
        return result.cpu()

    def gradients(
        self,
        kernel: Kernel,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        scores: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the gradients."""
        assert kernel.takes(query.shape[-2], key.shape[-2], query.shape[-1])
        saved = None if scores is None else self.own(scores)[0]
        dquery, dkey = l1.l1_scores_backward(
            *self.own(grad, query, key),
            scores=saved,
            backend=self.backend,
            variant=kernel.variant.name,
            **options,
        )
        return dquery.cpu(), dkey.cpu()

    def own(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The tensors where this machine wants them; those that are there stay as they are, strides and all."""
        return [tensor.to(self.device) for tensor in tensors]


@functools.lru_cache(maxsize=256)
def problem(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: str, ties: bool = False, **options: Any
) -> testing.Expected:
    """Inputs and what should come of them: computed once for all kernels."""
    query, key, grad = testing.inputs(query_shape, key_shape, dtype, ties=ties)
    return testing.Expected(query, key, grad, **options)


def assert_scores(machine: Machine, kernel: Kernel, expected: testing.Expected) -> torch.Tensor:
    """Run the kernel on the inputs of ``expected``; returns the scores, which are within their bound."""
    result = machine.scores(kernel, expected.query, expected.key, **expected.options)
    agreement = expected.scores(result, kernel.variant.f16_differences)
    assert agreement.ok, agreement
    return result


def assert_gradients(machine: Machine, kernel: Kernel, expected: testing.Expected) -> None:
    """Run the kernel with the scores saved, and without: both pairs of gradients are within their bounds."""
    saved = l1.l1_scores(expected.query, expected.key, **expected.options)
    for scores in (saved, None):
        gradients = machine.gradients(kernel, expected.grad, expected.query, expected.key, scores, **expected.options)
        expected.assert_gradients(*gradients)
