"""Attention as a composition of operations that torch can differentiate to any order, forwards and backwards.

It makes the matrix of scores, so it takes memory that grows with the product of the lengths. It is for what the fused
operators do not give: the weights themselves, dropout of them, tangents and second derivatives.
"""

from __future__ import annotations

import torch

from . import autograd
from .plan_attention import UNLIMITED, AttentionOptions

Ends = tuple[torch.Tensor, torch.Tensor]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    ends_q: torch.Tensor | None,
    ends_k: torch.Tensor | None,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (..., L, Ev) and lse (..., L) of `l1attn_cupy.l1_attention`, or of packed sequences with heads in front."""
    ends = None if ends_q is None or ends_k is None else (ends_q, ends_k)
    weights, lse, value = softmax(query, key, value, mask, options, ends)
    return product(weights, value).to(query.dtype), lse.expand(
        *torch.broadcast_shapes(lse.shape, (*value.shape[:-2], 1))
    )


def product(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``weights @ value`` in their dtype, also under autocast."""
    with torch.autocast(weights.device.type, enabled=False):
        return weights @ value


def softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    ends: Ends | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (..., L, S), lse (..., L), and value as it is to be multiplied by the weights.

    All are in the dtype of accumulation: scores of "inverse" are large, and their rounding to 16 bits would show in
    their exponentials. Keys that no query attends to have no influence, whatever they hold; the weights of a query
    without a key are 0.
    """
    if options.enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        excluded = _excluded(query.shape[-2], key.shape[-2], mask, options, ends, query.device)
        if excluded is not None:
            unused = excluded.all(-2).unsqueeze(-1)
            key, value = key.masked_fill(unused, 0), value.masked_fill(unused, 0)
        scores = autograd.l1_scores(
            query.to(dtype), key.to(dtype), options.score, options.scale, options.eps, options.backend, None
        )
        if mask is not None and mask.dtype is not torch.bool:
            scores = scores + mask.to(dtype)
        if excluded is None:
            return scores.softmax(-1), scores.logsumexp(-1), value.to(dtype)
        none = excluded.all(-1, keepdim=True)
        scores = scores.masked_fill(excluded, -torch.inf).masked_fill(none, 0)
        weights = scores.softmax(-1).masked_fill(none, 0)
        return weights, scores.logsumexp(-1).masked_fill(none.squeeze(-1), -torch.inf), value.to(dtype)


def _excluded(
    length_q: int,
    length_k: int,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    ends: Ends | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Where a mask, causality or the window rules a key out, broadcastable to (..., L, S) and of its last two sizes."""
    found = None
    if mask is not None:
        found = ~mask if mask.dtype is torch.bool else mask.detach() == -torch.inf
        found = found.expand(*found.shape[:-2], length_q, length_k)
    if options.left == options.right == UNLIMITED and ends is None:
        return found
    i, j = torch.arange(length_q, device=device), torch.arange(length_k, device=device)
    if ends is not None:
        starts_q, starts_k = (x.to(device, torch.int64) for x in ends)
        sequence_q, sequence_k = (torch.searchsorted(x[1:], n, right=True) for x, n in ((starts_q, i), (starts_k, j)))
        found = sequence_q.unsqueeze(-1) != sequence_k
        i, j = i - starts_q[sequence_q], j - starts_k[sequence_k]
    ahead = j - i.unsqueeze(-1)
    for outside, limit in ((ahead < -options.left, options.left), (ahead > options.right, options.right)):
        if limit != UNLIMITED:
            found = outside if found is None else found | outside
    return found
