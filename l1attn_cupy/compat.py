"""The module of the original l1attn library under its own name and conventions: its users change one import."""

from __future__ import annotations

import torch

from . import plan_modules
from .api import l1_scores


class L1Attn(torch.nn.Module):
    """Dense scores of ``q, k (batch, ctx, heads, width)``.

    Parameters
    ----------
    negative : bool
        Of the two conventions of the original::

            False   1 / (0.001 + distance / sqrt(width))    (batch, heads, query, key)
            True    -distance / sqrt(width)                 (batch, key, query, heads), its later one

    Examples
    --------
    >>> q, k = torch.zeros(1, 2, 3, 4), torch.ones(1, 5, 3, 4)
    >>> L1Attn()(q, k).shape, L1Attn(negative=True)(q, k).shape
    (torch.Size([1, 3, 2, 5]), torch.Size([1, 5, 2, 3]))
    """

    def __init__(self, negative: bool = False) -> None:
        super().__init__()
        self.negative = negative

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores of each query and key; gradients flow."""
        for name, array in (("q", q), ("k", k)):
            plan_modules.original_layout(name, tuple(array.shape))
        score = "negative" if self.negative else "inverse"
        scores = l1_scores(q.transpose(1, 2), k.transpose(1, 2), score=score, scale=q.shape[-1] ** -0.5)
        return scores.permute(0, 3, 2, 1) if self.negative else scores
