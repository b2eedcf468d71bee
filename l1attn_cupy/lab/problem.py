"""What a kernel is checked with: inputs that are hard on it, whatever its op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .. import testing
from ..cuda.registry import Variant
from ..testing import Agreement


class Problem(NamedTuple):
    """Inputs for one call.

    Parameters
    ----------
    title : str
        What is hard about it.
    sizes : tuple of int
        L, S and E; what is added to ``tiles``, where that is not 0.
    score : str
        Which F.
    kind : str
        "" for normally distributed numbers, or "ties", "special" (NaN and infinities), "broadcast" or "strided".
    tiles : int
        How many chunks of channels beside one tile of queries and one of keys.
    """

    title: str
    sizes: tuple[int, int, int]
    score: str
    kind: str = ""
    tiles: int = 0

    def __str__(self) -> str:
        length_q, length_k, channels = self.sizes
        return f'{self.title}: L={length_q} S={length_k} E={channels}, score "{self.score}"'


#: The first are small: what is badly wrong shows at once.
PROBLEMS = (
    Problem("odd sizes", (33, 65, 33), "inverse"),
    Problem("one of each", (1, 1, 1), "distance"),
    Problem("ties", (65, 65, 31), "inverse", "ties"),
    Problem("NaN and infinity", (33, 65, 65), "negative", "special"),
    Problem("rows apart in memory", (31, 33, 32), "distance", "strided"),
    Problem("broadcast batch", (33, 31, 17), "laplacian", "broadcast"),
    Problem("whole tiles", (0, 0, 0), "laplacian", tiles=2),
    Problem("beyond a tile", (1, 3, 5), "inverse", tiles=3),
    Problem("no channels", (3, 5, 0), "inverse"),
)


class Op(NamedTuple):
    """How to check and time an op.

    Parameters
    ----------
    run : callable
        Runs a problem on a backend, by the variant that `registry.only` sets; how far off each result is.
    prepare : callable
        Inputs of a shape (B, L, S, E) on the GPU, as a call without arguments by the variant of that name.
    numbers : callable
        Numbers that a call of a shape (B, L, S, E) must read and write at least.
    terms : int
        Terms for each ``|q - k|`` of a call.
    limit : str
        Which of the limits of `gpu` its terms have: "forward" or "backward".
    fewest_channels : int
        With fewer a call does not come to a kernel.
    bench : str
        What rows of a file of scripts/bench.py call the op; "" where it has none by shape.
    """

    run: Callable[[Variant, str, str, Problem], list[Agreement]]
    prepare: Callable[[str, str, Sequence[int]], Callable[[], Any]]
    numbers: Callable[[Sequence[int]], int]
    terms: int
    limit: str
    fewest_channels: int = 0
    bench: str = ""


def options(problem: Problem) -> dict[str, Any]:
    """So that no score leaves the range of float16, and none rounds to 0 beside an infinite gradient."""
    return {"score": problem.score, "scale": 0.05 if problem.kind == "special" else max(problem.sizes[2], 1) ** -0.5}


def place(tensor: torch.Tensor, backend: str, problem: Problem) -> torch.Tensor:
    """The tensor where the backend wants it; if "strided" with NaN or 99 between rows, for kernels that look there."""
    tensor = tensor.to("cuda" if backend == "cuda" else "cpu")
    if problem.kind != "strided":
        return tensor
    room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan if tensor.is_floating_point() else 99)
    room[..., : tensor.shape[-1]] = tensor
    return room[..., : tensor.shape[-1]]


def special(name: str, result: torch.Tensor, exact: torch.Tensor) -> Agreement:
    """Whether NaN and infinities are where the formula has them, in gradients that sum over them."""
    wrong = testing.first_mismatch(name, result, exact, None, 0.0)
    return Agreement(float("inf") if wrong else 0.0, 1.0, wrong)
