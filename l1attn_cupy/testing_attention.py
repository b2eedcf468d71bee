"""Hard inputs and tolerances for fused attention, as `testing` has for the scores.

Errors are relative to the size of the terms that a result is the sum of, element by element::

    out[i, c]      sum_j p[i, j] * |value[j, c]|
    lse[i]         1 + the largest |score[i, j]|
    ds[i, j]       p[i, j] * (sum_c |grad[i, c]| * (|value[j, c]| + |out[i, c]|) + |grad_lse[i]|)   the mask's gradient
    dquery, dkey   sum of |ds * F'(x) * scale| where query and key differ
    dvalue[j, c]   sum_i p[i, j] * |grad[i, c]|

For 16-bit and float32 arrays, the error may be 2 times (out and lse) or 3 times (gradients) that of the naive formula:
scores by broadcasting, `torch.softmax`, a matrix product, and autograd, in float32, from the same arrays; its results
are rounded to their dtype at the end. Its error is the largest over `testing.ORDERS` orders of rows and channels. Added
are `testing.ROUNDINGS` of float32, as the error of a small sum may be 0.
The same holds for the largest error of all, not relative to anything, with these roundings of the largest result.

In float64 the naive formula is itself the yardstick, so the bound is the worst case of both sides, with u = eps / 2::

    score     e = u * ((E + 3) * a + 3)            relative; a = max(1, x) for "laplacian", otherwise 1
    exponent  x = e * s + 3 * u * (s + 1)          absolute; s is the largest |score|
    out       2 * (2 * x + u * (2 * S + 10))
    gradient  2 * (4 * x + 2 * e + u * (4 * S + 2 * Ev + n + 20))         n terms in each sum of the gradient
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import attention as api
from . import reference, testing
from .testing import Agreement, as_tensor

FORWARD_MULTIPLE = 2
BACKWARD_MULTIPLE = 3


class _Exact(NamedTuple):
    """What is exact, the size of its terms, the bound relative to that, and the bound of the largest error."""

    result: torch.Tensor
    size: torch.Tensor
    bound: float
    largest: float = math.inf

    def agreement(self, result: Any, dtype: torch.dtype) -> Agreement:
        """The error relative to the size, raised where the largest error is nearer its bound."""
        error = testing._error("result", result, self.result, self.size, dtype)
        if not math.isinf(self.largest):
            largest = _largest_error(as_tensor(result), self.result)
            error = max(error, self.bound * largest / self.largest if self.largest else largest)
        return Agreement(error, self.bound)


class Inputs(NamedTuple):
    """The arrays of a call; the mask may be None, and the gradient of lse."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    grad_out: torch.Tensor
    grad_lse: torch.Tensor | None

    def to(self, device: str) -> Inputs:
        """The same arrays on another device."""
        return self.map(lambda x: x.to(device))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """What ``function`` makes of each array that is there."""
        mask, grad_lse = (None if x is None else function(x) for x in (self.mask, self.grad_lse))
        query, key, value, grad_out = (function(x) for x in (self.query, self.key, self.value, self.grad_out))
        return Inputs(query, key, value, mask, grad_out, grad_lse)


def inputs(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    channels_v: int,
    dtype: str,
    *,
    mask: tuple[str, tuple[int, ...]] | None = None,
    enable_gqa: bool = False,
    ties: bool = False,
    seed: int = 0,
) -> Inputs:
    """Query and key as from `testing.inputs`, value, a mask of a kind ("bool" or "added") and shape, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    *lead, heads, length, channels = (1, *query_shape)[-max(3, len(query_shape)) :]
    if enable_gqa:
        split = (*lead, key_shape[-3], heads // key_shape[-3], length, channels)
        query, key, _ = testing.inputs(split, (*key_shape[:-2], 1, *key_shape[-2:]), dtype, ties=ties, seed=seed)
        query, key = query.reshape(query_shape), key.squeeze(-3)
        rows: tuple[int, ...] = query_shape[:-1]
    else:
        query, key, scores = testing.inputs(query_shape, key_shape, dtype, ties=ties, seed=seed)
        rows = tuple(scores.shape[:-1])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    added = None
    if mask is not None:
        numbers = normal(*mask[1])
        added = numbers > -0.5 if mask[0] == "bool" else numbers.to(query.dtype)
    value, grad_out = (normal(*shape, channels_v).to(query.dtype) for shape in (key_shape[:-1], rows))
    return Inputs(query, key, value, added, grad_out, normal(*rows).to(_accumulation(query.dtype)))


def run(given: Inputs, **call: Any) -> list[torch.Tensor]:
    """out, lse, and the gradients of query, key, value and a mask that is added, by autograd."""
    leaves = [None if x is None else x.detach() for x in given[:4]]
    tracked = [x.requires_grad_() for x in leaves if x is not None and x.dtype is not torch.bool]
    query, key, value, mask = leaves
    out, lse = api.l1_attention(query, key, value, mask, return_lse=True, **call)
    grad_lse = torch.zeros_like(lse) if given.grad_lse is None else given.grad_lse
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], tracked, [given.grad_out, grad_lse])]


class _Order(NamedTuple):
    """Orders of rows and channels, in which the naive formula adds up."""

    queries: torch.Tensor
    keys: torch.Tensor
    channels: torch.Tensor
    channels_v: torch.Tensor


class _Gradients(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor


class ExpectedAttention:
    """What one call should give, and how far results may be from it."""

    def __init__(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any | None = None,
        grad_out: Any | None = None,
        grad_lse: Any | None = None,
        *,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> None:
        self.query, self.key, self.value = as_tensor(query), as_tensor(key), as_tensor(value)
        self.mask = None if attn_mask is None else as_tensor(attn_mask)
        self.grad_out = None if grad_out is None else as_tensor(grad_out)
        self.grad_lse = None if grad_lse is None else as_tensor(grad_lse)
        self.dtype = self.query.dtype
        self.is_causal, self.window = is_causal, window
        self.group = self.query.shape[-3] // self.key.shape[-3] if enable_gqa else 1
        self.options = options

    def assert_results(self, out: Any, lse: Any | None = None) -> None:
        """Raise AssertionError unless out, and lse if given, are within their bounds."""
        for agreement in self.results(out, lse):
            testing._raise_unless("out or lse", agreement)

    def assert_gradients(self, *gradients: Any) -> None:
        """The same for the gradients of query, key, value and, if given, of the mask."""
        names = ("dquery", "dkey", "dvalue", "dmask")
        for name, agreement in zip(names, self.gradients(*gradients), strict=False):
            testing._raise_unless(name, agreement)

    def results(self, out: Any, lse: Any | None = None) -> list[Agreement]:
        """How far ``out`` and ``lse`` are from what they should be."""
        dtypes = self.dtype, _accumulation(self.dtype)
        given = [out] if lse is None else [out, lse]
        return [e.agreement(x, dtype) for x, dtype, e in zip(given, dtypes, self._results, strict=False)]

    def gradients(self, *gradients: Any) -> list[Agreement]:
        """How far the gradients of query, key, value and, if given, of the mask are from what they should be."""
        return [e.agreement(x, self.dtype) for x, e in zip(gradients, self._gradients, strict=False)]

    @property
    def exact_results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the formula in float64."""
        return self._formula(torch.float64)

    @functools.cached_property
    @testing.one_thread()
    def exact_gradients(self) -> list[torch.Tensor]:
        """Those of the formula in float64."""
        return self._autograd(self._of_reference, torch.float64)

    @functools.cached_property
    @testing.one_thread()
    def _results(self) -> list[_Exact]:
        exact = self.exact_results
        scores = self._scores(torch.float64)
        largest = scores.masked_fill(scores == -torch.inf, 0).abs().amax(-1) if scores.shape[-1] else exact[1].abs()
        weights = _weights(scores, exact[1])
        terms = weights @ self._shared(self.value).double().abs()
        sizes = terms.clamp(min=torch.finfo(self.dtype).tiny), 1 + largest.expand_as(exact[1])
        if self.dtype == torch.float64:
            return [_Exact(exact[n], sizes[n], self._bound64()) for n in (0, 1)]
        with torch.no_grad():
            naive = [self._naive(order, *self._leaves(torch.float32)) for order in self._orders]
        outs, lses = zip(*naive, strict=True)
        results = [out.to(self.dtype) for out in outs], lses
        return [self._judged(FORWARD_MULTIPLE, *x) for x in zip(exact, sizes, results, strict=True)]

    @functools.cached_property
    @testing.one_thread()
    def _gradients(self) -> list[_Exact]:
        exact, sizes = self.exact_gradients, self._sizes()
        if self.dtype == torch.float64:
            bounds = [self._bound64(terms=self._terms(array)) for array in exact]
            return [_Exact(*x) for x in zip(exact, sizes, bounds, strict=False)]
        naive = [self._autograd(functools.partial(self._naive, order), torch.float32) for order in self._orders]
        results = [[gradient.to(self.dtype) for gradient in same] for same in zip(*naive, strict=True)]
        return [self._judged(BACKWARD_MULTIPLE, *x) for x in zip(exact, sizes, results, strict=False)]

    def _judged(self, multiple: int, exact: torch.Tensor, size: torch.Tensor, naive: Sequence[torch.Tensor]) -> _Exact:
        """With the bound that the errors of the naive formula give."""
        error = max(testing._relative(one, exact, size) for one in naive)
        if not math.isfinite(error):
            raise ValueError("the naive formula in float32 overflows here: choose other numbers")
        roundings = testing.ROUNDINGS * torch.finfo(torch.float32).eps / 2
        largest = multiple * max(_largest_error(one, exact) for one in naive)
        largest += roundings * _largest_error(torch.zeros_like(exact), exact)
        return _Exact(exact, size, multiple * error + roundings, largest)

    @property
    def _orders(self) -> list[_Order]:
        sizes = (self.query.shape[-2], *self.key.shape[-2:], self.value.shape[-1])
        return [_Order(*order) for order in testing.orders(*sizes)]

    def _leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Query, key, value and a mask that is added, in ``dtype``."""
        given = (self.query, self.key, self.value, self.mask)
        return [x.to(dtype) for x in given if x is not None and x.dtype is not torch.bool]

    def _naive(
        self, order: _Order, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse by the naive formula in the dtype of its arguments; NaN of rows without a key becomes 0."""
        added = self._added(query.dtype)
        if mask:
            added = torch.where(added == -torch.inf, added, mask[0])
        added = _taken(added, order.queries, order.keys)
        query, key = _taken(query, order.queries, order.channels), _taken(key, order.keys, order.channels)
        scores = reference.l1_scores(query, self._shared(key), dtype=query.dtype, **self.options)
        scores = torch.where(added == -torch.inf, added, scores + added)
        none = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(none, 0)
        value = _taken(value, order.keys, order.channels_v)
        out = torch.softmax(scores, -1).masked_fill(none, 0) @ self._shared(value)
        lse = torch.logsumexp(scores, -1).masked_fill(none.squeeze(-1), -torch.inf).expand(out.shape[:-1])
        back = order.queries.argsort()
        return _taken(out, back, order.channels_v.argsort()), lse[..., back]

    def _of_reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: torch.Tensor) -> Any:
        added = mask[0] if mask else self.mask
        return self._attention(query, self._shared(key), self._shared(value), added, query.dtype)

    def _shared(self, array: torch.Tensor) -> torch.Tensor:
        """Key or value with a head for each head of query."""
        return array.repeat_interleave(self.group, -3) if self.group > 1 else array

    def _formula(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._shared(self.key), self._shared(self.value)
        return self._attention(self.query, key, value, self.mask, dtype)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.l1_attention(
            query, key, value, mask, is_causal=self.is_causal, window=self.window, dtype=dtype, **self.options
        )

    def _added(self, dtype: torch.dtype) -> torch.Tensor:
        """All masks as one that is added to the scores, (..., L, S)."""
        shape = self.query.shape[-2], self.key.shape[-2]
        excluded = reference.excluded_by_place(*shape, self.is_causal, self.window)
        added = torch.zeros(shape, dtype=dtype)
        if self.mask is not None and self.mask.dtype is torch.bool:
            excluded = excluded | ~self.mask
        elif self.mask is not None:
            added = self.mask.to(dtype).expand(torch.broadcast_shapes(self.mask.shape, shape))
        return torch.where(excluded, -torch.inf, added)

    def _scores(self, dtype: torch.dtype) -> torch.Tensor:
        """Scores with all masks."""
        scores = reference.l1_scores(self.query, self._shared(self.key), dtype=dtype, **self.options)
        added = self._added(dtype)
        return torch.where(added == -torch.inf, -torch.inf, scores + added)

    def _autograd(self, attention: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        """Gradients of all that is differentiable, by autograd in ``dtype``."""
        leaves = [x.requires_grad_() for x in self._leaves(dtype)]
        out, lse = attention(*leaves)
        loss = (out * self._grad_out.to(dtype)).sum()
        if self.grad_lse is not None:
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * self.grad_lse.to(dtype)).sum()
        return list(torch.autograd.grad(loss, leaves))

    @property
    def _grad_out(self) -> torch.Tensor:
        if self.grad_out is None:
            raise ValueError("gradients can be told only where grad_out is given")
        return self.grad_out

    def _sizes(self) -> list[torch.Tensor]:
        """For each element of the gradients the sum of the absolute values of its terms."""
        out, lse = self._formula(torch.float64)
        weights, grad, value = _weights(self._scores(torch.float64), lse), self._grad_out.double().abs(), self.value
        delta = (grad * out.abs()).sum(-1)
        delta = delta if self.grad_lse is None else delta + self.grad_lse.double().abs()
        ds = weights * (grad @ self._shared(value).double().abs().mT + delta.unsqueeze(-1))
        scores = reference.l1_scores(self.query, self._shared(self.key), **self.options)
        signs = testing._signs(self.query.double(), self._shared(self.key).double())
        found = self._summed(ds, (ds * self._slope(scores)).abs(), signs.abs(), weights, grad)
        tiny = torch.finfo(self.dtype).tiny
        return [torch.where(size > 0, size.clamp(min=tiny), 0.0) for size in found]

    def _summed(
        self, ds: torch.Tensor, h: torch.Tensor, signs: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor
    ) -> _Gradients:
        """The sums of all four gradients, that of key without its sign."""
        terms = h.unsqueeze(-1) * signs
        key, value = terms.sum(-3), weights.mT @ grad
        mask = ds if self.mask is None else ds.sum_to_size((1,) * (2 - self.mask.ndim) + self.mask.shape)
        return _Gradients(
            terms.sum(-2).sum_to_size(self.query.shape),
            self._unshared(key, self.key),
            self._unshared(value, self.value),
            mask if self.mask is None else mask.reshape(self.mask.shape),
        )

    def _unshared(self, gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Summed over the heads that share one, and over what was broadcast."""
        if self.group > 1:
            gradient = gradient.unflatten(-3, (-1, self.group)).sum(-3)
        return gradient.sum_to_size(like.shape)

    def _slope(self, scores: torch.Tensor) -> torch.Tensor:
        """dscore/ddistance, ``F'(x) * scale``."""
        derivative = reference.DERIVATIVES[self.options.get("score", "inverse")]
        return derivative(scores) * self.options.get("scale", 1.0)

    def _terms(self, gradient: torch.Tensor) -> float:
        pairs = math.prod(self._grad_out.shape[:-1]) * self.key.shape[-2]
        return pairs / max(1, math.prod(gradient.shape[:-1]))

    def _bound64(self, terms: float | None = None) -> float:
        """The worst case for out and lse, or for a gradient that sums ``terms``."""
        u = torch.finfo(torch.float64).eps / 2
        largest = self._scores(torch.float64)
        s = largest[largest.isfinite()].abs().amax().item() if largest.isfinite().any() else 0.0
        amplified = 1.0
        if self.options.get("score") == "laplacian":
            x = reference.l1_scores(self.query, self._shared(self.key), **{**self.options, "score": "distance"})
            amplified = max(1.0, x.nan_to_num(0, 0).amax().item() if x.numel() else 0.0)
        e = u * ((self.query.shape[-1] + 3) * amplified + 3)
        exponent, length = e * s + 3 * u * (s + 1), self.key.shape[-2]
        if terms is None:
            return 2 * (2 * exponent + u * (2 * length + 10))
        return 2 * (4 * exponent + 2 * e + u * (4 * length + 2 * self.value.shape[-1] + terms + 20))


def _taken(array: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return array[..., rows, :][..., columns]


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _largest_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (result.double() - exact).abs()
    difference = difference[difference.isfinite()]  # NaN and infinity are compared elsewhere
    return difference.max().item() if difference.numel() else 0.0


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
