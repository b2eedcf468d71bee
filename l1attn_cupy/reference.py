"""The formulas in a few lines of broadcasting: what every kernel is checked against.

They make the (..., L, S, E) tensor that the kernels avoid. Torch only: its autograd gives reference gradients.
"""

from __future__ import annotations

from typing import Any

import torch

#: F of each score, as a function of ``x = scale * distance`` and eps.
FUNCTIONS = {
    "inverse": lambda x, eps: 1 / (eps + x),
    "negative": lambda x, eps: -x,
    "laplacian": lambda x, eps: torch.exp(-x),
    "distance": lambda x, eps: x,
}

#: F' of each score, as a function of the score.
DERIVATIVES = {
    "inverse": lambda s: -s * s,
    "negative": lambda s: -torch.ones_like(s),
    "laplacian": lambda s: -s,
    "distance": lambda s: torch.ones_like(s),
}


def l1_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    score: str = "inverse",
    scale: float = 1.0,
    eps: float = 1e-3,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Scores (..., L, S) of query (..., L, E) and key (..., S, E), computed and returned in ``dtype``."""
    difference = query.to(dtype).unsqueeze(-2) - key.to(dtype).unsqueeze(-3)
    return FUNCTIONS[score](scale * difference.abs().sum(-1), eps)


def l1_scores_backward(
    grad_scores: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    score: str = "inverse",
    scale: float = 1.0,
    eps: float = 1e-3,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the formula by autograd, computed and returned in ``dtype``."""
    q, k = (array.detach().to(dtype).requires_grad_() for array in (query, key))
    result = l1_scores(q, k, score=score, scale=scale, eps=eps, dtype=dtype)
    dquery, dkey = torch.autograd.grad(result, (q, k), grad_scores.to(dtype))
    return dquery, dkey


def l1_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (..., L, Ev) and lse (..., L) of `l1attn_cupy.l1_attention`, computed and returned in ``dtype``."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = l1_scores(query, key, dtype=dtype, **options)
    excluded = excluded_by_place(scores.shape[-2], scores.shape[-1], is_causal, window)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        excluded = excluded | ~attn_mask
    elif attn_mask is not None:
        excluded = excluded | (attn_mask == -torch.inf)
        scores = scores + attn_mask.to(dtype)
    excluded = excluded.expand(torch.broadcast_shapes(scores.shape, (*value.shape[:-2], 1, 1)))
    none = excluded.all(-1, keepdim=True)  # of the keys
    scores = scores.masked_fill(excluded, -torch.inf).masked_fill(none, 0)
    weights = torch.softmax(scores, -1).masked_fill(none, 0)
    values = value.to(dtype).unsqueeze(-3).masked_fill(excluded.unsqueeze(-1), 0)
    lse = torch.logsumexp(scores, -1).masked_fill(none.squeeze(-1), -torch.inf)
    return (weights.unsqueeze(-1) * values).sum(-2), lse


def excluded_by_place(length_q: int, length_k: int, is_causal: bool, window: tuple[int, int] | None) -> torch.Tensor:
    """Which keys causality or the window rules out, (L, S)."""
    ahead = torch.arange(length_k) - torch.arange(length_q).unsqueeze(-1)
    left, right = window or (-1, -1)
    excluded = ahead > 0 if is_causal else torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        excluded = excluded | (ahead < -left)
    if right >= 0:
        excluded = excluded | (ahead > right)
    return excluded
