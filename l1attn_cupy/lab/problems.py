"""How to check each op: the call, and the formula in float64.

A new op needs an entry in `OPS`, with a function that runs one problem and says how far off the result is.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cuda import registry
from ..cuda.registry import KernelError, Variant
from ..testing import Agreement
from . import problems_attention, problems_scores
from .problem import PROBLEMS, Op, Problem

#: How to check each op of `registry.OPS`.
OPS = {**problems_scores.OPS, **problems_attention.OPS}


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
        wanted = zip("qke", _sizes(variant, problem), strict=True)
        length_q, length_k, channels = (_within(variant, key, size) for key, size in wanted)
        sizes = length_q, length_k, channels
        if channels >= fewest:
            found.setdefault((sizes, problem.kind), problem._replace(sizes=sizes))
    return list(found.values())


def _sizes(variant: Variant, problem: Problem) -> Sequence[int]:
    """Those of a problem, or as many as the tiles of ``variant`` have and a few more; small tiles count as 32."""
    if not problem.tiles:
        return problem.sizes
    blocks = variant.parameters
    rows = [max(32, blocks.get(f"BLOCK_{side}", blocks.get("BLOCK_X", 0))) for side in "QK"]
    tile = (*rows, problem.tiles * blocks.get("BLOCK_E", 32))
    return [size + more for size, more in zip(tile, problem.sizes, strict=True)]


def _within(variant: Variant, key: str, size: int) -> int:
    return min(max(size, variant.limits.get(f"min_{key}", 0)), variant.limits.get(f"max_{key}", size))


def check(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    """Run one problem by ``variant``, with its parameters as they are."""
    with registry.only(variant):
        return of(variant).run(variant, dtype, backend, problem)
