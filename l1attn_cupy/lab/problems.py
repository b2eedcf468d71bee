"""What a kernel is checked with, op by op: inputs that are hard on it, the call, and the formula in float64.

A new op needs an entry in `OPS`, with a function that runs one problem and says how far off the result is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import l1attn_cupy as l1

from .. import reference, testing
from ..cuda import registry
from ..cuda.registry import KernelError, Variant
from ..testing import Agreement, Expected


class Problem(NamedTuple):
    """Inputs for one call.

    Parameters
    ----------
    title : str
        What is hard about it.
    sizes : tuple of int
        L, S and E.
    score : str
        Which F.
    kind : str
        "" for normally distributed numbers, or "ties", "special" (NaN and infinities), "broadcast" or "strided".
    """

    title: str
    sizes: tuple[int, int, int]
    score: str
    kind: str = ""

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
    Problem("multiples of tiles", (128, 128, 32), "laplacian"),
    Problem("beyond a tile", (129, 131, 37), "inverse"),
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
    """

    run: Callable[[Variant, str, str, Problem], list[Agreement]]
    prepare: Callable[[str, str, Sequence[int]], Callable[[], Any]]
    numbers: Callable[[Sequence[int]], int]
    terms: int
    limit: str
    fewest_channels: int = 0


def of(variant: Variant) -> Op:
    """How to check the op of ``variant``."""
    if variant.op not in OPS:
        raise KernelError(f"{variant.where}: the lab cannot check {variant.op} yet, only {', '.join(OPS)}")
    return OPS[variant.op]


def problems(variant: Variant) -> list[Problem]:
    """All of `PROBLEMS`, their sizes brought within the limits of ``variant``."""
    fewest = of(variant).fewest_channels
    found: dict[tuple, Problem] = {}
    for problem in PROBLEMS:
        length_q, length_k, channels = (_within(variant, k, n) for k, n in zip("qke", problem.sizes, strict=True))
        sizes = length_q, length_k, channels
        if channels >= fewest:
            found.setdefault((sizes, problem.kind), problem._replace(sizes=sizes))
    return list(found.values())


def _within(variant: Variant, key: str, size: int) -> int:
    return min(max(size, variant.limits.get(f"min_{key}", 0)), variant.limits.get(f"max_{key}", size))


def check(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    """Run one problem by ``variant``, with its parameters as they are."""
    with registry.only(variant):
        return of(variant).run(variant, dtype, backend, problem)


# ---- scores -------------------------------------------------------------------------------------------------------


def _scores_forward(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    query, key, _ = _inputs(problem, dtype)
    options = _options(problem)
    arrays = (_place(tensor, backend, problem) for tensor in (query, key))
    result = l1.l1_scores(*arrays, backend=backend, variant=variant.name, **options)
    return [Expected(query, key, **options).scores(result.cpu(), variant.f16_differences)]


def _scores_backward(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    query, key, grad = _inputs(problem, dtype)
    options = _options(problem)
    saved = reference.l1_scores(query, key, **options).to(query.dtype)
    *arrays, scores = (_place(tensor, backend, problem) for tensor in (grad, query, key, saved))
    results = l1.l1_scores_backward(*arrays, scores=scores, backend=backend, variant=variant.name, **options)
    dquery, dkey = (result.cpu() for result in results)
    if problem.kind != "special":
        return list(Expected(query, key, grad, **options).gradients(dquery, dkey))
    exact = reference.l1_scores_backward(grad, query, key, **options)
    return [
        _special(name, result, one) for name, result, one in zip(("dquery", "dkey"), (dquery, dkey), exact, strict=True)
    ]


def _special(name: str, result: torch.Tensor, exact: torch.Tensor) -> Agreement:
    """Whether NaN and infinities are where the formula has them, in gradients that sum over them."""
    wrong = testing.first_mismatch(name, result, exact, None, 0.0)
    return Agreement(float("inf") if wrong else 0.0, 1.0, wrong)


def _options(problem: Problem) -> dict[str, Any]:
    """So that no score leaves the range of float16, and none rounds to 0 beside an infinite gradient."""
    return {"score": problem.score, "scale": 0.05 if problem.kind == "special" else max(problem.sizes[2], 1) ** -0.5}


def _inputs(problem: Problem, dtype: str) -> Sequence[torch.Tensor]:
    """Query, key and gradient of the scores."""
    length_q, length_k, channels = problem.sizes
    batch_q: tuple[int, ...]
    batch_q, batch_k = ((3, 1), (1, 2)) if problem.kind == "broadcast" else ((1,), (1,))
    shapes = (*batch_q, length_q, channels), (*batch_k, length_k, channels)
    query, key, grad = testing.inputs(*shapes, dtype, ties=problem.kind in ("ties", "special"))
    if problem.kind == "special":
        for at, value in enumerate((torch.inf, -torch.inf, torch.nan)):
            query[0, at % length_q, at % channels] = value
            key[-1, (at + 3) % length_k, (at + 2) % channels] = value
    return query, key, grad


def _place(tensor: torch.Tensor, backend: str, problem: Problem) -> torch.Tensor:
    """The tensor where the backend wants it; if "strided" with NaN between rows, for kernels that see neighbours."""
    tensor = tensor.to("cuda" if backend == "cuda" else "cpu")
    if problem.kind != "strided":
        return tensor
    room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
    room[..., : tensor.shape[-1]] = tensor
    return room[..., : tensor.shape[-1]]


def _prepare_forward(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    query, key, _ = _on_gpu(dtype, shape)
    return lambda: l1.l1_scores(query, key, variant=name)


def _prepare_backward(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    query, key, grad = _on_gpu(dtype, shape)
    saved = l1.l1_scores(query, key)
    return lambda: l1.l1_scores_backward(grad, query, key, scores=saved, variant=name)


def _numbers_forward(shape: Sequence[int]) -> int:
    """Query, key, scores."""
    batch, length_q, length_k, channels = shape
    return batch * (channels * (length_q + length_k) + length_q * length_k)


def _numbers_backward(shape: Sequence[int]) -> int:
    """Query, key, their gradients, scores and the gradient of these."""
    return 2 * _numbers_forward(shape)


def _on_gpu(dtype: str, shape: Sequence[int]) -> list[torch.Tensor]:
    batch, length_q, length_k, channels = shape
    inputs = testing.inputs((batch, length_q, channels), (batch, length_k, channels), dtype)
    return [tensor.cuda() for tensor in inputs]


#: How to check each op of `registry.OPS`.
OPS = {
    "scores_forward": Op(_scores_forward, _prepare_forward, _numbers_forward, 1, "forward"),
    "scores_backward": Op(_scores_backward, _prepare_backward, _numbers_backward, 2, "backward", fewest_channels=1),
}
