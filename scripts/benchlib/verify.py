"""No number is printed for a wrong result: each peer against the float64 formula, on sampled rows."""

from __future__ import annotations

from typing import Any

import torch

from benchlib.cases import Case
from benchlib.peers import EPS

ROWS = 24  # rows of the first and of the last head that are recomputed in float64


class WrongResult(Exception):
    """A peer's result is outside the bound; its row says so and carries no time."""


class Oracle:
    """Scores and gradients of sampled rows in float64, from the first set of inputs.

    With a = query, b = key and h = g * F'(x):  da[i] = sum_j h[i, j] * sign(a[i] - b[j]).
    dkey is the same formula with the two exchanged and g transposed.
    """

    def __init__(self, case: Case, query: Any, key: Any, grad: Any) -> None:
        self.case = case
        self.grad = grad
        self.heads = sorted({0, case.batch - 1})
        sums = grad[:, :, :1].expand_as(grad)  # a gradient of row sums is the same along the row
        self.rows = [self._rows(query[b], key[b], grad[b]) for b in self.heads]
        self.cols = [self._rows(key[b], query[b], grad[b].T) for b in self.heads]
        self.row_sums = [self._rows(query[b], key[b], sums[b]) for b in self.heads]
        self.col_sums = [self._rows(key[b], query[b], sums[b].T) for b in self.heads]

    @staticmethod
    def _rows(a: Any, b: Any, grad: Any) -> tuple[Any, Any, Any, Any]:
        """(indices, scores, da, sum_j |h|) of evenly spaced rows, never more than a few rows at once."""
        index = torch.linspace(0, a.shape[0] - 1, min(ROWS, a.shape[0]), device=a.device).long()
        a, b, grad = a[index].double(), b.double(), grad[index].double()
        scores, gradient = [], []
        for i in range(len(index)):
            difference = a[i] - b
            scores.append(1.0 / (EPS + difference.abs().sum(-1)))
            gradient.append((-grad[i] * scores[i] ** 2) @ difference.sign())
        s = torch.stack(scores)
        return index, s, torch.stack(gradient), (grad * s**2).abs().sum(-1, keepdim=True)

    def tolerance(self, additions: int, precise: bool = False) -> float:
        """Twice: a unit of the accumulator per addition, 16 of the stored dtype for what is rounded once."""
        stored = torch.float64 if precise else getattr(torch, self.case.dtype)
        accumulator = torch.promote_types(stored, torch.float32)
        return 2.0 * (additions * torch.finfo(accumulator).eps + 16 * torch.finfo(stored).eps)

    def check_forward(self, out: Any, rows_only: bool) -> None:
        """All terms have one sign: a sum of E of them is off by at most E units of itself."""
        out = torch.as_tensor(out)
        additions = self.case.channels + (self.case.k_len if rows_only else 0)
        bound = self.tolerance(additions, precise=out.dtype == torch.float64)
        for head, (index, scores, _, _) in zip(self.heads, self.rows, strict=True):
            if head >= len(out):
                continue
            expected = scores.sum(-1, keepdim=True) if rows_only else scores
            error = ((out[head][index].double() - expected).abs() / expected.abs()).max().item()
            if not error <= bound:
                raise WrongResult(f"scores off by {error:.1e} of their size, bound {bound:.1e}")

    def check_backward(self, dquery: Any, dkey: Any, rows_only: bool) -> None:
        """h = -g * score**2 has the score's error twice; the sum adds a unit of sum |h| per addition."""
        rows, cols = (self.row_sums, self.col_sums) if rows_only else (self.rows, self.cols)
        bound = self.tolerance(2 * self.case.channels + max(self.case.q_len, self.case.k_len))
        for name, result, samples in (("dquery", dquery, rows), ("dkey", dkey, cols)):
            for head, (index, _, expected, size) in zip(self.heads, samples, strict=True):
                if head >= len(result):
                    continue
                error = ((result[head][index].double() - expected).abs() / size).max().item()
                if not error <= bound:
                    raise WrongResult(f"{name} off by {error:.1e} of sum |h|, bound {bound:.1e}")
