"""What is timed: shapes, how many heads of each fit, and the rotated inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

GRID_HEADS = 512 * 8  # the original benchmark: batch 512, 8 heads
GRID_LENGTHS = (16, 32, 64, 128, 256)
GRID_CHANNELS = (16, 32, 33, 64, 65, 96, 97, 128)
QUICK_GRID = ((16, 16), (64, 33), (128, 97), (256, 128))
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
TERMS_PER_PASS = {"forward": 1, "backward": 2, "forward+backward": 3}


@dataclass(frozen=True)
class Case:
    """One shape and dtype: query (batch, q_len, channels), key (batch, k_len, channels)."""

    group: str  # "main", "long", "wide", "grid" or "user"
    batch: int
    q_len: int
    k_len: int
    channels: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.q_len, self.k_len, self.channels

    def terms(self, op: str) -> int:
        """Terms of one call: L*S*E per head for the scores, and as many again for each of dquery and dkey."""
        return TERMS_PER_PASS[op] * self.batch * self.q_len * self.k_len * self.channels

    def bytes_moved(self, op: str) -> int:
        """Least traffic: inputs read once, outputs written once (backward also reads g and the scores)."""
        rows = self.batch * self.channels * (self.q_len + self.k_len)
        scores = self.batch * self.q_len * self.k_len
        forward, backward = rows + scores, 2 * rows + 2 * scores
        count = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[op]
        return count * ITEMSIZE[self.dtype]

    def eager_bytes(self) -> int:
        """Size of the (batch, L, S, E) tensor that broadcasting makes."""
        return self.terms("forward") * ITEMSIZE[self.dtype]

    def with_eager_at_most(self, limit: int) -> Case | None:
        """The same case with fewer heads, so that the broadcast tensor fits; None if one head does not."""
        batch = min(self.batch, limit * self.batch // self.eager_bytes())
        return replace(self, batch=batch) if batch >= 1 else None


def grid(dtype: str, max_terms: float, quick: bool) -> list[Case]:
    """The original benchmark's shapes, with as many of its 4096 heads as stay within `max_terms`."""
    pairs = QUICK_GRID if quick else [(n, e) for n in GRID_LENGTHS for e in GRID_CHANNELS]
    heads = [max(1, min(GRID_HEADS, int(max_terms // (n * n * e)))) for n, e in pairs]
    return [Case("grid", b, n, n, e, dtype) for b, (n, e) in zip(heads, pairs, strict=True)]


def parse(text: str, dtypes: list[str], max_terms: float, quick: bool) -> list[Case]:
    """`text` is a comma-separated list of group names and of BxLxSxE shapes.

    Examples
    --------
    >>> [case.shape for case in parse("main,2x8x9x33", ["float32"], 1e9, False)]
    [(8, 1024, 1024, 64), (2, 8, 9, 33)]
    """
    fixed = {"main": (8, 1024, 1024, 64), "long": (1, 8192, 8192, 64), "wide": (16, 2048, 2048, 64)}
    cases: list[Case] = []
    for word in text.split(","):
        for dtype in dtypes:
            if word == "grid":
                cases += grid(dtype, max_terms, quick)
                continue
            sizes = fixed.get(word) or tuple(int(n) for n in word.split("x") if n.isdigit())
            if len(sizes) != 4 or min(sizes) < 1:
                raise SystemExit(f"--shapes takes {', '.join(fixed)}, grid or BxLxSxE, got {word!r}")
            cases.append(Case(word if word in fixed else "user", *sizes, dtype=dtype))
    return cases


def make_inputs(case: Case, device: str, cache_bytes: int, seed: int = 0) -> list[tuple[Any, Any, Any]]:
    """Sets of (query, key, grad_scores): 2 to 16, so many that together they exceed the cache."""
    rows, scores = case.channels * (case.q_len + case.k_len), case.q_len * case.k_len
    one_set = case.batch * (rows + scores) * ITEMSIZE[case.dtype]
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*size: int) -> Any:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    batch, q_len, k_len, channels = case.shape
    return [
        (normal(batch, q_len, channels), normal(batch, k_len, channels), normal(batch, q_len, k_len))
        for _ in range(max(2, min(16, 1 + cache_bytes // one_set)))
    ]
