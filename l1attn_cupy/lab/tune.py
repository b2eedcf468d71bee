"""`lab tune`: every combination of the values that a ``@variant`` line lists; the best goes to a tuning file.

Combinations that do not compile, spill, do not fit on a multiprocessor or compute something wrong are left out. The
rest is timed on a GPU. Without one it is ranked by machine code: instructions of the hot loop per term, times what the
tiles of the shape compute beyond its edges; of equals, the one with more warps at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..cuda import machine_code, registry, tuning
from ..cuda.machine_code import ToolMissing
from ..cuda.registry import KernelError, Variant
from . import checking, child, costs, new, problems, screen, timing
from .checking import Right
from .costs import Costs
from .problem import PROBLEMS
from .shapes import Shape


class Wanted(NamedTuple):
    """What to tune."""

    op: str
    shapes: Sequence[Shape]
    dtypes: Sequence[str]
    variant: str | None
    arch: str | None
    backend: str | None
    limit: float


class Place(NamedTuple):
    """Where kernels run, or would: its name in tuning files, and whose machine code to weigh."""

    backend: str
    device: str
    arch: str


class Candidate(NamedTuple):
    """One combination: ``why_not`` is empty if it may be used; smaller ``cost`` is better."""

    chosen: dict[str, int]
    costs: Costs | None
    why_not: str
    cost: float = float("inf")  # milliseconds, or what `weigh` makes of machine code


def run(wanted: Wanted, output: Path | None) -> int:
    """Tune every shape and dtype, print what was found, write the winners; 1 if there is not one for each."""
    cases = list(_cases(wanted))
    place = _ask(wanted)
    file = output or new.own_folder() / tuning.FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', place.device.lower())}.json"
    if file.is_file():
        tuning.read(file)  # a bad file is an error before the work, not after
    out = screen.console()
    by = "time" if place.backend == "cuda" else "machine code"
    how = (
        "timed on it" if by == "time" else "there is no GPU: ranked by machine code, the winner is checked by emulation"
    )
    out.print(f"{wanted.op} on {place.device}; {how}")
    entries = []
    for variant, dtype, shape in cases:
        found = _tune_one(wanted, place, variant, dtype, shape)
        out.print(_table(found, variant, dtype, shape, by))
        best = next((candidate for candidate in found if not candidate.why_not), None)
        if best:
            key = (place.device, wanted.op, variant.name, dtype, tuning.shape_class(shape.sizes))
            entries.append(tuning.Entry(*key, by, best.chosen))
    if entries:
        tuning.write(file, entries)
        out.print(f"written to {file}{_reach(file)}")
    if len(entries) < len(cases):
        out.print(f"no winner for {len(cases) - len(entries)} of {len(cases)} shapes and dtypes")
    return int(len(entries) < len(cases))


def _reach(file: Path) -> str:
    """Whether calls will find what is in ``file``."""
    folders = [(folder / tuning.FOLDER).resolve() for folder in registry.folders()]
    return "" if file.parent.resolve() in folders else f", which calls read once it lies in {folders[0]}"


def _cases(wanted: Wanted) -> Iterator[tuple[Variant, str, Shape]]:
    """Each shape and dtype with the line that a call of it comes to; of dtypes not asked for those with lists."""
    seen: dict[tuple[str, str], Shape] = {}
    for shape in wanted.shapes:
        lines = dict(_lines(wanted, shape))
        tunable = {dtype: variant for dtype, variant in lines.items() if variant.choices}
        for dtype, variant in (lines if wanted.dtypes or not tunable else tunable).items():
            problems.of(variant)  # whether the lab knows how to check it
            if not variant.choices:
                example = "no parameter lists values (BLOCK_Q=64,128)"
                raise KernelError(f"{variant.where}: there is nothing to tune, {example}")
            name = tuning.shape_class(shape.sizes)
            same = seen.setdefault((dtype, name), shape)
            if same is not shape:
                raise ValueError(f"--shapes must be of different classes; {same} and {shape} are both {name}")
            yield variant, dtype, shape


def _lines(wanted: Wanted, shape: Shape) -> Iterator[tuple[str, Variant]]:
    """The line for each dtype that is asked for, or that the variants take."""
    known = [v for v in registry.variants(wanted.op) if wanted.variant in (None, v.name)]
    taken = [d for d in registry.DTYPES.values() if any(d in v.dtypes for v in known) or not known]
    for dtype in wanted.dtypes or taken:
        yield dtype, registry.choose(wanted.op, dtype, shape.sizes, wanted.variant)


def _ask(wanted: Wanted) -> Place:
    """Where kernels run; asked in a child, so that this process holds no GPU."""
    event = child.first(place_of, wanted.backend, wanted.arch, limit=wanted.limit + child.COMPILING)
    if isinstance(event, Place):
        return event
    raise KernelError(event.message)


def place_of(backend: str | None, arch: str | None) -> Iterator[Any]:
    """Runs in a child."""
    used = checking.choose_backend(backend)
    if used.backend == "cuda":
        yield Place("cuda", used.note, used.arch)
    elif missing := machine_code.missing():
        raise KernelError(f"without a GPU variants are ranked by machine code, which cannot be had here: {missing}")
    else:
        yield Place("emulator", f"sm_{arch or used.arch}", arch or used.arch)


# ---- one shape ----------------------------------------------------------------------------------------------------


def _tune_one(wanted: Wanted, place: Place, variant: Variant, dtype: str, shape: Shape) -> list[Candidate]:
    """All candidates, the best first, those that may not be used last."""
    found = []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   console=screen.console(stderr=True), transient=True)  # fmt: skip
    with bar:
        for chosen in bar.track(variant.combinations(), description=f"{shape} {dtype}"):
            arguments = (variant, chosen, dtype, shape, place)
            event = child.first(examine, *arguments, limit=wanted.limit + child.COMPILING)
            found.append(event if isinstance(event, Candidate) else Candidate(chosen, None, event.message))
    usable = [candidate for candidate in found if not candidate.why_not]
    rest = [candidate for candidate in found if candidate.why_not]
    if place.backend == "cuda":
        return [*_timed(wanted, variant, usable, dtype, shape), *rest]
    usable.sort(key=lambda candidate: (candidate.cost, -candidate.costs.occupancy.warps if candidate.costs else 0))
    return _first_right(wanted, variant, usable, dtype, rest)


def examine(variant: Variant, chosen: dict[str, int], dtype: str, shape: Shape, place: Place) -> Iterator[Candidate]:
    """One combination, in a child: compiled and weighed, and checked on a GPU."""
    candidate = weigh(variant, chosen, dtype, shape, place.arch)
    if not candidate.why_not and place.backend == "cuda":
        candidate = candidate._replace(why_not=_what_is_wrong(variant.with_parameters(chosen), dtype, "cuda"))
    yield candidate


def weigh(variant: Variant, chosen: dict[str, int], dtype: str, shape: Shape, arch: str) -> Candidate:
    """What machine code says of a combination."""
    try:
        found = costs.costs(variant.with_parameters(chosen), dtype, arch)
    except ToolMissing:
        return Candidate(chosen, None, "")  # there is a GPU to ask instead
    except KernelError as error:
        return Candidate(chosen, None, f"does not compile: {_reason(str(error))}")
    if found.resources.spilled:
        return Candidate(chosen, found, f"spills {found.resources.spilled} bytes")
    if not found.occupancy.blocks:
        return Candidate(chosen, found, f"does not fit: {found.occupancy.limit}")
    per_term = found.slots_per_term
    if per_term is None:
        return Candidate(chosen, found, "")
    return Candidate(chosen, found, "", round(per_term * beyond_the_edges({**variant.parameters, **chosen}, shape), 3))


def beyond_the_edges(parameters: dict[str, int], shape: Shape) -> float:
    """What the tiles of a shape compute, over what is wanted of them."""

    def padded(size: int, block: str) -> float:
        tile = parameters.get(block, 1)
        return -(-size // tile) * tile / size

    both = (padded(shape.length_q, "BLOCK_X") + padded(shape.length_k, "BLOCK_X")) / 2
    tile = padded(shape.length_q, "BLOCK_Q") * padded(shape.length_k, "BLOCK_K")
    return tile * padded(shape.channels, "BLOCK_E") * both


def _reason(log: str) -> str:
    """The first error of a compiler's log, in a line; the reason of a static_assert alone."""
    first = next((line for line in log.splitlines() if "error:" in line), log.splitlines()[0])
    quoted = re.search(r'static assertion failed with "(.*)"', first)
    return quoted[1] if quoted else first.partition("error:")[2].strip() or first


def _what_is_wrong(variant: Variant, dtype: str, backend: str) -> str:
    result = checking.check(variant, dtype, backend)
    return "" if isinstance(result, Right) else f"wrong: {result.message.splitlines()[0]}"


def check_one(variant: Variant, dtype: str, backend: str, limit: float) -> Iterator[str]:
    """Runs in a child: what is wrong with it, "" if nothing."""
    checking.set_time_limit(limit)
    yield _what_is_wrong(variant, dtype, backend)


def _first_right(
    wanted: Wanted, variant: Variant, ranked: list[Candidate], dtype: str, rest: list[Candidate]
) -> list[Candidate]:
    """Check the best by emulation; where it is wrong, the next."""
    wrong: list[Candidate] = []
    for at, candidate in enumerate(ranked):
        if candidate.cost == float("inf"):
            unknown = "cannot be ranked without a GPU: no term is recognised in its machine code"
            return [*(c._replace(why_not=unknown) for c in ranked[at:]), *wrong, *rest]
        arguments = (variant.with_parameters(candidate.chosen), dtype, "emulator", wanted.limit)
        event = child.first(check_one, *arguments, limit=len(PROBLEMS) * wanted.limit + child.COMPILING)
        why_not = event.message if isinstance(event, child.Died) else event
        if not why_not:
            return [*ranked[at:], *wrong, *rest]
        wrong.append(candidate._replace(why_not=why_not))
    return [*wrong, *rest]


def _timed(wanted: Wanted, variant: Variant, usable: list[Candidate], dtype: str, shape: Shape) -> list[Candidate]:
    """The same with their times on the GPU, the fastest first."""
    if not usable:
        return []
    entrants = {str(at): variant.with_parameters(candidate.chosen) for at, candidate in enumerate(usable)}
    limit = child.COMPILING + len(usable) * wanted.limit
    event = child.first(times, entrants, dtype, shape, limit=limit)
    if isinstance(event, child.Died):
        raise KernelError(f"{variant.where}: {event.message}")
    with_times = [c._replace(cost=milliseconds) for c, milliseconds in zip(usable, event, strict=True)]
    return sorted(with_times, key=lambda candidate: candidate.cost)


def times(entrants: dict[str, Variant], dtype: str, shape: Shape) -> Iterator[list[float]]:
    """Runs in a child: milliseconds of each."""
    yield [timed.milliseconds for timed in timing.rank(entrants, dtype, shape)]


def _table(found: list[Candidate], variant: Variant, dtype: str, shape: Shape, by: str) -> Any:
    unit = "ms" if by == "time" else "cost"
    name = f"{variant.path.name}:{variant.line}, {dtype}, {shape} (class {tuning.shape_class(shape.sizes)})"
    made = screen.table("", "parameters", f" {unit}", " regs", " occupancy", "", title=name)
    first = {key: values[0] for key, values in variant.choices.items()}
    for at, candidate in enumerate(found):
        known = candidate.costs
        chosen = " ".join(f"{key}={value}" for key, value in candidate.chosen.items())
        remarks = [candidate.why_not or ("best" if at == 0 else ""), "default" if candidate.chosen == first else ""]
        made.add_row(
            "-" if candidate.why_not else str(at + 1),
            chosen,
            "-" if candidate.why_not or candidate.cost == float("inf") else f"{candidate.cost:.4g}",
            str(known.resources.registers) if known else "-",
            f"{known.occupancy.share:.0%}" if known else "-",
            ", ".join(filter(None, remarks)),
        )
    return made
