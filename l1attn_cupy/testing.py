"""What the tests and ``scripts/check.py`` share: hard inputs, and the one place for tolerances.

Every error here is relative to the terms a result is the sum of, element by element::

    scores[i, j]    |F(x)|                                   x is a sum of numbers >= 0: nothing cancels
    dquery[i, k]    sum_j |h[i, j]| * (query[i, k] != key[j, k])
    dkey[j, k]      sum_i |h[i, j]| * (query[i, k] != key[j, k])

so a small result next to a large one is judged by its own size, and where every term is 0 the result must
be exactly 0. Below the smallest normal number of a dtype its rounding step no longer shrinks: smaller sizes
count as that number.

The bound, for 16-bit and float32 arrays, with u = eps / 2 of a dtype, half a step of the last digit::

    bound = MULTIPLE * error of the naive formula + u(dtype of the arrays) + ROUNDINGS * u(float32)

- The naive formula takes the same arrays, accumulates in float32 and rounds its result to their dtype. Its
  backward pass uses scores that were rounded, as the saved forward result is. Its error is the largest over
  `ORDERS` orders of rows and channels, as the rounding error of one small sum in one order may well be 0.
- The second term is the rounding of the result to its dtype, the third the float32 operations of F and scale.

In float64 the naive formula is itself the yardstick, so the bound is the worst case of both sides::

    score     e = 2 * u * ((E + 3) * a + 3)                  a = max(1, x) for "laplacian", otherwise 1
    gradient      2 * e + 2 * u * (n + 3)                    n terms in each sum of the gradient

A kernel that rounds differences and short sums of them to float16 (``f16_differences=1`` in its header) has an error
relative to the worst case of that, and the bound is 1: with u16 = 2**-11::

    distance  off = (F16_SUM * u16 + E * u32) * x
    score     F(x -+ off), then (u16 + 8 * u32) of that, and 2**-25

Each difference passes through at most `F16_SUM` roundings, its own and those of the float16 sums it is part of; these
are added up in float32. F, which may be 2 ulp off, has 8 roundings; at last the result is rounded to float16, whose
steps below its normal numbers are 2**-24.

A sum of E differences takes E subtractions, E - 1 additions and a scaling; each term passes through at most
E + 1 of them. `exp` turns a relative error of e in x into one of x * e. F' depends on the score at most
squared.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from . import reference

MULTIPLE = 4
ROUNDINGS = 4
F16_SUM = 16
ORDERS = 4

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class Mismatch(NamedTuple):
    """The first wrong element of a result, and how many there are."""

    name: str
    place: tuple[int, ...]
    expected: float
    got: float
    wrong: int
    total: int

    def __str__(self) -> str:
        element = f"{self.name}[{', '.join(map(str, self.place))}]"
        return f"{element} must be {self.expected:.7g}, got {self.got:.7g} ({self.wrong} of {self.total} are wrong)"


class Agreement(NamedTuple):
    """Largest error of a result and the bound for it, both relative (see the top of this file)."""

    error: float
    bound: float
    wrong: Mismatch | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"error {self.error:.2e}, bound {self.bound:.2e}" + (f"; {self.wrong}" if self.wrong else "")


def inputs(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: str, *, ties: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, and a gradient of their scores, normally distributed.

    With ``ties`` the numbers are multiples of 1/2 from -1 to 1, so that a fifth or more of all channels tie,
    and the first rows of key are those of query.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = torch.broadcast_shapes(query_shape[:-2], key_shape[:-2])
    shapes = (query_shape, key_shape, (*batch, query_shape[-2], key_shape[-2]))
    query, key, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if ties:
        query, key = (query.mul(2).round().clamp(-2, 2) / 2 for query in (query, key))
        rows = min(query.shape[-2], key.shape[-2])
        if query.shape[:-2] == key.shape[:-2]:
            key[..., :rows, :] = query[..., :rows, :]
        elif query.numel():
            key[..., :rows, :] = query.reshape(-1, *query.shape[-2:])[0, :rows]
    return tuple(array.to(DTYPES[dtype]) for array in (query, key, grad))  # type: ignore[return-value]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For the formula: in its many short operations torch's threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_tensor(array: Any) -> torch.Tensor:
    """A tensor with the numbers of a NumPy array of any layout and dtype, or the tensor itself, detached."""
    if isinstance(array, torch.Tensor):
        return array.detach()
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


class Expected:
    """What one call should give, and how far results may be from it."""

    def __init__(self, query: Any, key: Any, grad: Any = None, **options: Any) -> None:
        self.query, self.key = as_tensor(query), as_tensor(key)
        self._grad = None if grad is None else as_tensor(grad)
        self.dtype = self.query.dtype
        self.options = options

    @property
    def grad(self) -> torch.Tensor:
        if self._grad is None:
            raise ValueError("gradients can be told only where grad is given")
        return self._grad

    def scores(self, result: Any, f16_differences: bool = False) -> Agreement:
        """How far ``result`` is from the scores, of which it is told whether differences were rounded to float16."""
        exact, size, bound = self._scores
        if f16_differences:
            size, bound = self._worst_of_f16_differences(exact), 1.0
        error = _error("scores", result, exact, size, self.dtype)
        return Agreement(error, bound, first_mismatch("scores", result, exact, size, bound))

    def gradients(self, dquery: Any, dkey: Any) -> tuple[Agreement, Agreement]:
        """How far ``dquery`` and ``dkey`` are from the gradients."""
        agreements = [
            Agreement(
                _error(name, result, exact, size, self.dtype), bound, first_mismatch(name, result, exact, size, bound)
            )
            for name, result, (exact, size, bound) in zip(
                ("dquery", "dkey"), (dquery, dkey), self._gradients, strict=True
            )
        ]
        return agreements[0], agreements[1]

    def assert_scores(self, result: Any) -> None:
        """Raise AssertionError unless ``result`` is within the bound."""
        _raise_unless("scores", self.scores(result))

    def assert_gradients(self, dquery: Any, dkey: Any) -> None:
        """Raise AssertionError unless both gradients are within their bounds."""
        for name, agreement in zip(("dquery", "dkey"), self.gradients(dquery, dkey), strict=True):
            _raise_unless(name, agreement)

    @functools.cached_property
    @one_thread()
    def _scores(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Exact scores, the size of their terms, and the bound."""
        exact = reference.l1_scores(self.query, self.key, **self.options)
        size = exact.abs().clamp(min=torch.finfo(self.dtype).tiny)
        if self.dtype == torch.float64:
            return exact, size, self._score_bound64()
        errors = [_relative(order.undo_scores(self._naive_scores(order)), exact, size) for order in self._orders]
        return exact, size, _bound(errors, self.dtype)

    @functools.cached_property
    @one_thread()
    def _gradients(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """The same of dquery and of dkey."""
        exact = reference.l1_scores_backward(self.grad, self.query, self.key, **self.options)
        sizes = self._gradient_sizes()
        if self.dtype == torch.float64:
            bounds = [self._gradient_bound64(like) for like in (self.query, self.key)]
        else:
            naive = [self._naive_gradients(order) for order in self._orders]
            bounds = [
                _bound([_relative(pair[which], exact[which], sizes[which]) for pair in naive], self.dtype)
                for which in (0, 1)
            ]
        return list(zip(exact, sizes, bounds, strict=True))

    def _gradient_sizes(self) -> list[torch.Tensor]:
        """For each element of the gradients the sum of the absolute values of its terms."""
        tiny = torch.finfo(self.dtype).tiny
        h = (self.grad.double() * self._slope(self._scores[1])).abs()
        terms = h.unsqueeze(-1) * _signs(self.query.double(), self.key.double()).abs()
        sums = terms.sum(-2).sum_to_size(self.query.shape), terms.sum(-3).sum_to_size(self.key.shape)
        return [torch.where(size > 0, size.clamp(min=tiny), 0.0) for size in sums]

    @functools.cached_property
    def _orders(self) -> list[_Order]:
        sizes = (self.query.shape[-2], self.key.shape[-2], self.query.shape[-1])
        return [_Order(*order) for order in orders(*sizes)]

    def _naive_scores(self, order: _Order) -> torch.Tensor:
        query, key = order.query(self.query), order.key(self.key)
        return reference.l1_scores(query, key, **self.options, dtype=torch.float32).to(self.dtype)

    def _naive_gradients(self, order: _Order) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients in float32, summed in the order given, from scores rounded to the dtype of the arrays."""
        h = order.scores(self.grad).float() * self._slope(self._naive_scores(order).float())
        signs = _signs(order.query(self.query).float(), order.key(self.key).float())
        terms = signs.mul_(h.unsqueeze(-1))
        dquery = terms.sum(-2).sum_to_size(self.query.shape).to(self.dtype)
        dkey = -terms.sum(-3).sum_to_size(self.key.shape).to(self.dtype)
        return order.undo_query(dquery), order.undo_key(dkey)

    def _slope(self, scores: torch.Tensor) -> torch.Tensor:
        """dscore/ddistance, ``F'(x) * scale``."""
        derivative = reference.DERIVATIVES[self.options.get("score", "inverse")]
        return derivative(scores) * self.options.get("scale", 1.0)

    def _score_bound64(self) -> float:
        amplified = 1.0
        if self.options.get("score") == "laplacian":
            x = reference.l1_scores(self.query, self.key, **{**self.options, "score": "distance"})
            amplified = max(1.0, x.nan_to_num(0, 0).max().item() if x.numel() else 0.0)
        return torch.finfo(torch.float64).eps * ((self.query.shape[-1] + 3) * amplified + 3)

    def _worst_of_f16_differences(self, exact: torch.Tensor) -> torch.Tensor:
        """The most that each score may be off (see the top of this file)."""
        query, key = self.query.double(), self.key.double()
        x = reference.l1_scores(query, key, score="distance")
        off = (F16_SUM * 2.0**-11 + query.shape[-1] * 2.0**-24) * x
        function = reference.FUNCTIONS[self.options.get("score", "inverse")]
        scale, eps = self.options.get("scale", 1.0), self.options.get("eps", 1e-3)
        ends = [function(scale * distance, eps) for distance in ((x - off).clamp(min=0), x + off)]
        rounding = 2.0**-11 + 8 * 2.0**-24
        return torch.maximum(*((end - exact).abs() + rounding * end.abs() + 2.0**-25 for end in ends))

    def _gradient_bound64(self, like: torch.Tensor) -> float:
        terms = self.grad.numel() / max(1, math.prod(like.shape[:-1]))
        return 2 * self._score_bound64() + torch.finfo(torch.float64).eps * (terms + 3)


def assert_same_special(result: Any, expected: Any) -> None:
    """Raise AssertionError unless NaN and infinities are at the same places in both, with the same signs."""
    result, expected = as_tensor(result), as_tensor(expected)
    _expect("result", result, expected.shape, expected.dtype)
    if not _same_special(result, expected):
        raise AssertionError(f"NaN or infinity at other places:\n{result}\nexpected\n{expected}")


def first_mismatch(
    name: str, result: Any, exact: torch.Tensor, size: torch.Tensor | None, bound: float
) -> Mismatch | None:
    """The first element, if any, that is off by more than ``bound * size``, or NaN or infinite unlike ``exact``.

    Without ``size`` only NaN and infinities are compared.
    """
    tensor = as_tensor(result)
    rounded = exact.to(tensor.dtype)
    special = ~(tensor.isfinite() & rounded.isfinite())
    same = (tensor == rounded) | (tensor.isnan() & rounded.isnan())
    wrong = special & ~same
    if size is not None:
        wrong |= ~special & ((tensor.double() - exact).abs() > bound * size)
    if not wrong.any():
        return None
    first = tuple(int(n) for n in wrong.nonzero()[0])
    return Mismatch(name, first, exact[first].item(), tensor[first].item(), int(wrong.sum()), tensor.numel())


def _raise_unless(name: str, agreement: Agreement) -> None:
    if not agreement.ok:
        raise AssertionError(f"{name}: {agreement}")


def _expect(name: str, result: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(result.shape) != tuple(shape) or result.dtype != dtype:
        raise AssertionError(f"{name} must be {tuple(shape)} of {dtype}, got {tuple(result.shape)} of {result.dtype}")


def _same_special(result: torch.Tensor, expected: torch.Tensor) -> bool:
    special = ~(result.isfinite() & expected.isfinite())
    if not special.any():
        return True
    a, b = result[special], expected[special]
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _error(name: str, result: Any, exact: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> float:
    """As `_relative`, after a check of shape and dtype."""
    tensor = as_tensor(result)
    _expect(name, tensor, exact.shape, dtype)
    return _relative(tensor, exact, size)


def _relative(result: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> float:
    """Largest error relative to ``size``; infinite unless NaN and infinity are where ``exact`` has them."""
    if not _same_special(result, exact.to(result.dtype)):
        return math.inf
    difference = (result.double() - exact).abs_()
    fine = (difference == 0) | ~result.isfinite()
    relative = difference.div_(size).masked_fill_(fine, 0.0)
    return relative.max().item() if relative.numel() else 0.0


def orders(*sizes: int) -> list[list[torch.Tensor]]:
    """`ORDERS` times an order of as many numbers as each size says: first the given one, then random ones."""
    generator = torch.Generator().manual_seed(0)
    rest = [[torch.randperm(n, generator=generator) for n in sizes] for _ in range(ORDERS - 1)]
    return [[torch.arange(n) for n in sizes], *rest]


def _bound(naive: Sequence[float], dtype: torch.dtype) -> float:
    """The bound from the errors of the naive formula."""
    if not math.isfinite(max(naive)):
        raise ValueError("the naive formula in float32 overflows here: choose other numbers")
    return MULTIPLE * max(naive) + torch.finfo(dtype).eps / 2 + ROUNDINGS * torch.finfo(torch.float32).eps / 2


def _signs(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """sign(query[i, k] - key[j, k]), shape (..., L, S, E). Floats differ by 0 only if they are equal."""
    return (query.unsqueeze(-2) - key.unsqueeze(-3)).sign_()


class _Order(NamedTuple):
    """A permutation of the rows of query, of the rows of key, and of the channels of both."""

    rows_q: torch.Tensor
    rows_k: torch.Tensor
    channels: torch.Tensor

    def query(self, query: torch.Tensor) -> torch.Tensor:
        return query[..., self.rows_q, :][..., self.channels]

    def key(self, key: torch.Tensor) -> torch.Tensor:
        return key[..., self.rows_k, :][..., self.channels]

    def scores(self, scores: torch.Tensor) -> torch.Tensor:
        return scores[..., self.rows_q, :][..., self.rows_k]

    def undo_query(self, query: torch.Tensor) -> torch.Tensor:
        return query[..., self.rows_q.argsort(), :][..., self.channels.argsort()]

    def undo_key(self, key: torch.Tensor) -> torch.Tensor:
        return key[..., self.rows_k.argsort(), :][..., self.channels.argsort()]

    def undo_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return scores[..., self.rows_q.argsort(), :][..., self.rows_k.argsort()]
