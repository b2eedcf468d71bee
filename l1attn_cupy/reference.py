"""The formula of L1 scores in a few lines of broadcasting: what every kernel is checked against.

It makes the (..., L, S, E) tensor that the kernels avoid. Torch only: its autograd gives reference gradients.
"""

from __future__ import annotations

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
