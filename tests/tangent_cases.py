"""Tangents of the scores by the formula, and how far those of kernels may be from them; see `l1attn_cupy.testing`."""

from __future__ import annotations

import torch
from cases import options

from l1attn_cupy import reference, testing


def problem(query_shape, key_shape, dtype):
    """Query, key and tangents of both; many channels tie."""
    query, key, _ = testing.inputs(query_shape, key_shape, dtype, ties=True)
    tangents, more, _ = testing.inputs(query_shape, key_shape, dtype, seed=1)
    return query, key, tangents, more


def options_of(score, channels):
    """Neither scores nor their tangents leave the range of float16."""
    return {**options(score, channels), "eps": 0.5}


def by_kernel(given, score, scale, eps, backend=None, variant=None, saved=True):
    """What the operator makes of `problem`, with the scores saved or not."""
    call = (score, scale, eps, backend, variant)
    scores = reference.l1_scores(*given[:2], score=score, scale=scale, eps=eps).to(given[0]) if saved else None
    return torch.ops.l1attn.scores_jvp(*given, scores, *call)


@testing.one_thread()
def assert_tangents(result, given, score, scale, eps):
    """Raise AssertionError unless the error is within the bound, relative to the sum of the sizes of all terms.

    The bound is that of gradients: `testing.MULTIPLE` times the error of the naive formula, which accumulates in
    float32 and takes F' from scores that were rounded, and the roundings of the result. In float64 it is the worst case
    of both sides, with one more rounding for the difference of the tangents.
    """
    query, key = given[:2]
    dtype, channels = query.dtype, query.shape[-1]
    exact, size = _tangents(given, torch.float64, score, scale, eps)
    assert result.dtype is dtype
    assert result.shape == exact.shape
    if not exact.numel():
        return
    if dtype is torch.float64:
        u = torch.finfo(dtype).eps / 2
        farthest = reference.l1_scores(query, key, score="distance", scale=scale).max().item()
        of_score = 2 * u * ((channels + 3) * (max(1, farthest) if score == "laplacian" else 1) + 3)
        bound = 2 * of_score + 2 * u * (channels + 4)
    else:
        naive, _ = _tangents(given, torch.float32, score, scale, eps)
        u, u32 = (torch.finfo(x).eps / 2 for x in (dtype, torch.float32))
        bound = testing.MULTIPLE * _error(naive.to(dtype), exact, size) + u + testing.ROUNDINGS * u32
    error = _error(result, exact, size)
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


def _error(result, exact, size):
    return ((result.double() - exact).abs() / size).max().item()


def _tangents(given, dtype, score, scale, eps):
    q, k, tq, tk = (x.to(dtype) for x in given)
    d, t = q.unsqueeze(-2) - k.unsqueeze(-3), tq.unsqueeze(-2) - tk.unsqueeze(-3)
    x = scale * d.abs().sum(-1)
    s = {"inverse": lambda: 1 / (eps + x), "laplacian": lambda: (-x).exp()}.get(score, lambda: x)()
    if dtype is torch.float32:
        s = s.to(given[0].dtype).float()
    slope = {"inverse": -s * s, "laplacian": -s, "negative": -torch.ones_like(s), "distance": torch.ones_like(s)}[score]
    size = (slope * scale * (t.abs() * (d != 0)).sum(-1)).abs().clamp(min=torch.finfo(given[0].dtype).tiny)
    return slope * scale * (d.sign() * t).sum(-1), size
