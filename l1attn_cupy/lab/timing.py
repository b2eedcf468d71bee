"""How fast kernels are, on a GPU: all in turn, round by round, beside the limit that is measured in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..cuda import devices, registry, tuning
from ..cuda.registry import KernelError, Variant
from . import problems
from .problem import Op
from .shapes import Shape

ROUNDS, WARM_UP = 15, 3


class Timed(NamedTuple):
    """One variant on one shape and dtype.

    Parameters
    ----------
    role : str
        "this", "origin" (what it was copied from) or "default" (what a call gets).
    milliseconds : float
        Median over the rounds.
    rate : float
        Terms per second.
    share : float or None
        Of the measured limit; None where there is no limit for the dtype.
    ratio : float
        How many times faster than it "this" is: median of the ratios within a round.
    """

    role: str
    variant: Variant
    dtype: str
    shape: Shape
    milliseconds: float
    rate: float
    share: float | None
    ratio: float


def compare(variants: Sequence[Variant], origin: Variant | None, backend: str, shape: Shape) -> Iterator[Any]:
    """Times of each dtype: this file's variant, the one it was copied from, and the default."""
    from .checking import Note

    if backend != "cuda":
        yield Note("not timed: there is no GPU; emulation says nothing about speed, machine code does")
        return
    for dtype in registry.DTYPES.values():
        mine = next((v for v in variants if v.fits(dtype, shape.sizes)), None)
        if mine is None:
            continue
        try:
            default = registry.choose(mine.op, dtype, shape.sizes, None)
            default = tuning.tuned(default, dtype, shape.sizes, devices.names("cuda", "cuda:0"))
        except KernelError as error:  # in another file
            yield Note(f"not compared with the default: {error}")
            default = mine
        source = next((v for v in registry.read(origin.path) if v.fits(dtype, shape.sizes)), None) if origin else None
        entrants = {"this": mine, "origin": source, "default": default}
        yield from rank({role: variant for role, variant in entrants.items() if variant}, dtype, shape)


def rank(entrants: dict[str, Variant], dtype: str, shape: Shape) -> list[Timed]:
    """Time all of them in turn, beside the limit; ratios are to the first."""
    from . import gpu

    clock = gpu.CudaClock()
    op = problems.of(next(iter(entrants.values())))
    calls = {role: _call(variant, op, dtype, shape) for role, variant in entrants.items()}
    limit = gpu.CudaLimit(op.limit, dtype) if dtype in gpu.HAS_LIMIT[op.limit] else None
    for call in calls.values():
        for _ in range(WARM_UP):
            _seconds(clock, call)
    times: dict[str, list[float]] = {role: [] for role in calls}
    limits: list[float] = []
    for _ in range(ROUNDS):
        for role, call in calls.items():
            times[role].append(_seconds(clock, call))
        if limit:
            limits.append(1e9 / limit.seconds_per_1e9_terms())
    terms = op.terms * shape.pairs
    first = times[next(iter(times))]
    return [
        Timed(
            role,
            entrants[role],
            dtype,
            shape,
            1e3 * statistics.median(taken),
            terms / statistics.median(taken),
            statistics.median(terms / t / most for t, most in zip(taken, limits, strict=True)) if limits else None,
            statistics.median(t / own for t, own in zip(taken, first, strict=True)),
        )
        for role, taken in times.items()
    ]


def _call(variant: Variant, op: Op, dtype: str, shape: Shape) -> Callable[[], Any]:
    call = op.prepare(variant.name, dtype, shape)

    def run() -> Any:
        with registry.only(variant):
            return call()

    return run


def _seconds(clock: Any, call: Callable[[], Any]) -> float:
    clock.before_call()
    start = clock.stamp()
    call()
    return clock.seconds(start, clock.stamp())
