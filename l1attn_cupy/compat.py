"""The module of the original l1attn library under its own name and conventions: its users change one import."""

from __future__ import annotations

from typing import NoReturn

import torch

from . import plan_modules
from .api import l1_scores
from .modules import spec_of


class L1Attn(torch.nn.Module):
    """Dense scores of ``q, k (batch, ctx, heads, width)``.

    Parameters
    ----------
    negative : bool
        Of the two conventions of the original::

            False   1 / (0.001 + distance / sqrt(width))    (batch, heads, query, key)
            True    -distance / sqrt(width)                 (batch, key, query, heads), its later one

    Raises
    ------
    TypeError
        ``negative`` is not a bool.

    Examples
    --------
    >>> q, k = torch.zeros(1, 2, 3, 4), torch.ones(1, 5, 3, 4)
    >>> L1Attn()(q, k).shape, L1Attn(negative=True)(q, k).shape
    (torch.Size([1, 3, 2, 5]), torch.Size([1, 5, 2, 3]))
    """

    def __init__(self, negative: bool = False) -> None:
        super().__init__()
        plan_modules.flags(negative=negative)
        self.negative = negative

    def __prepare_scriptable__(self) -> NoReturn:
        plan_modules.not_scriptable(type(self).__name__)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores of each query and key; gradients flow.

        Parameters
        ----------
        q : tensor, shape (batch, ctx, heads, width)
            float16, bfloat16, float32 or float64.
        k : tensor, shape (batch, ctx of its own, heads, width)
            Of q's dtype and device.

        Returns
        -------
        tensor, shape (batch, heads, query, key), or (batch, key, query, heads) for ``negative``
            In q's dtype, or autocast's.

        Raises
        ------
        TypeError, ValueError
            A tensor does not fit. Nothing is broadcast.
        """
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, torch.Tensor):
                plan_modules.not_a_tensor(name, x)
        autocast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)
        plan_modules.original(spec_of(q), spec_of(k), autocast)
        score = "negative" if self.negative else "inverse"
        scores = l1_scores(q.transpose(1, 2), k.transpose(1, 2), score=score, scale=q.shape[-1] ** -0.5)
        return scores.permute(0, 3, 2, 1) if self.negative else scores
