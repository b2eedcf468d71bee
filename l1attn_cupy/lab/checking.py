"""`lab try`, the part that runs the kernel: from a file to events, first whether it is right, then what it costs.

Runs in a child process (see `child`), which a kernel may take down with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..cuda import devices, registry
from ..cuda.occupancy import MULTIPROCESSORS
from ..cuda.registry import KernelError, Variant
from ..emulator.errors import EmulatorCompileError, EmulatorError
from . import costs, problems, timing
from .costs import Costs
from .shapes import Shape


class Using(NamedTuple):
    """What runs the kernels, "cuda" or "emulator"; the card's name, or why not; whose machine code to look at."""

    backend: str
    note: str
    arch: str


class Read(NamedTuple):
    """The file has been read: its variants, and what they are compared with."""

    variants: tuple[Variant, ...]
    origin: Variant | None


class Right(NamedTuple):
    """All problems of one line and dtype came out right; ``closest`` is the largest error over its bound."""

    variant: Variant
    dtype: str
    problems: int
    closest: float


class Wrong(NamedTuple):
    """A result is wrong, or the kernel did something that it may not."""

    variant: Variant
    dtype: str
    problem: str
    message: str


class Unusable(NamedTuple):
    """The file cannot be compiled, or its header cannot be read."""

    message: str


class Cost(NamedTuple):
    """Machine code of one line and dtype, and the same of the variant it was copied from."""

    variant: Variant
    dtype: str
    costs: Costs
    origin: Costs | None


class Note(NamedTuple):
    """Something that could not be done, and why."""

    message: str


class Done(NamedTuple):
    """The end: whether everything was right."""

    right: bool


Event = Using | Read | Right | Wrong | Unusable | Cost | Note | Done | timing.Timed

_FIRST = ("float32", "float16", "bfloat16", "float64", "int8", "uint8")  # what is checked first
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"__global__[^;{}()]*(?:__launch_bounds__\s*\([^)]*\))?[^;{}()]*?\b(\w+)\s*\(\s*(?:const\s+)?(\w+)")


def attempt(path: Path, backend: str | None, arch: str | None, limit: float, shape: Shape) -> Iterator[Event]:
    """Everything that there is to say about the kernels of ``path``.

    Parameters
    ----------
    path : Path
        A ``.cu`` file, in any folder.
    backend : str or None
        "cuda", "emulator", or None for a GPU if there is one.
    arch : str or None
        Architecture whose machine code is examined; None for the GPU's own.
    limit : float
        Seconds that one emulated launch may take.
    shape : Shape
        What is timed on a GPU.
    """
    set_time_limit(limit)
    try:
        variants = registry.read(path)
        for variant in variants:
            problems.of(variant)
            check_entry(variant)
    except (KernelError, OSError) as error:
        yield Unusable(str(error))
        yield Done(False)
        return
    origin, note = origin_of(variants[0])
    yield Read(variants, origin)
    yield from _namesakes(variants[0])
    using = choose_backend(backend)
    yield using
    if note:
        yield Note(note)
    for variant in variants:
        if variant.choices:
            first = " ".join(f"{name}={values[0]}" for name, values in variant.choices.items())
            yield Note(f"line {variant.line} lists values: {first} is tried, lab tune tries them all")
    right = True
    for event in _check_all(variants, using.backend):
        right = right and isinstance(event, Right)
        yield event
    if right:
        yield from _costs_of_all(variants, origin, arch or using.arch)
        yield from timing.compare(variants, origin, using.backend, shape)
    yield Done(right)


def set_time_limit(seconds: float) -> None:
    """For each emulated launch of this process."""
    os.environ["L1ATTN_EMULATOR_TIME_LIMIT"] = f"{seconds:g}"


def choose_backend(asked: str | None) -> Using:
    """The GPU where there is one, unless ``asked`` for emulation."""
    from ..cuda import compiler

    missing = compiler.missing()
    if asked == "cuda" and missing:
        raise KernelError(f"--backend cuda cannot be used here: {missing}")
    if asked == "emulator" or missing:
        return Using("emulator", "as asked" if asked else re.split(r"[:(]", missing)[0].strip(), costs.ARCH)
    name, arch = devices.names("cuda", "cuda:0")
    own = arch.removeprefix("sm_")
    return Using("cuda", name, own if own in MULTIPROCESSORS else costs.ARCH)


def check_entry(variant: Variant) -> None:
    """Raise a KernelError unless the file has the op's entry point, which the compilers would say less clearly."""
    text = variant.path.read_text(encoding="utf-8")
    code = _COMMENTS.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    struct = "".join(word.capitalize() for word in variant.op.split("_"))
    wanted = f'extern "C" __global__ void {variant.op}(const {struct} p)'
    entries = [(code.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _ENTRY.finditer(code)]
    if not entries:
        raise KernelError(f"{variant.path}:1: there is no kernel: its entry point must be {wanted}")
    if not any(name == variant.op for _, name, _ in entries):
        line, name, _ = entries[0]
        raise KernelError(f"{variant.path}:{line}: the entry point must be {wanted}, got the name {name}")
    line, _, got = next(entry for entry in entries if entry[1] == variant.op)
    if got != struct:
        raise KernelError(f"{variant.path}:{line}: the entry point must be {wanted}, got the parameter {got}")


def origin_of(variant: Variant) -> tuple[Variant | None, str]:
    """The variant whose file the header's Delta line names first, and why there is none."""
    text = variant.path.read_text(encoding="utf-8")
    delta = re.search(rf"^//\s*Delta\b.*?\b({variant.op}_\w+)\.cu", text, re.MULTILINE)
    if not delta:
        return None, ""
    try:
        name = delta[1].removeprefix(f"{variant.op}_")
        found = [v for v in registry.variants(variant.op) if v.name == name and v.path != variant.path]
    except KernelError as error:
        return None, f"not compared with other variants: {error}"
    return (found[0], "") if found else (None, "")


def _namesakes(variant: Variant) -> Iterator[Event]:
    """Another file of the same name: one's own is used instead of a packaged one, where calls find it."""
    for folder in registry.folders():
        other = folder / variant.path.name
        if other.is_file() and other.resolve() != variant.path.resolve():
            yield Note(f"there is another file of this name, {other}; the one in L1ATTN_KERNELS is used")


def same_dtype(variant: Variant | None, dtype: str) -> Variant | None:
    """The line of the file of ``variant`` that takes ``dtype``."""
    lines = registry.read(variant.path) if variant else ()
    return next((line for line in lines if dtype in line.dtypes), None)


# ---- the parts ----------------------------------------------------------------------------------------------------


def kernels(variants: tuple[Variant, ...]) -> list[tuple[Variant, str]]:
    """Each line with each of its dtypes, float32 first: it compiles fastest, and shows most mistakes."""
    return [(variant, dtype) for dtype in _FIRST for variant in variants if dtype in variant.dtypes]


def _check_all(variants: tuple[Variant, ...], backend: str) -> Iterator[Event]:
    """Until something is wrong."""
    for variant, dtype in kernels(variants):
        result = check(variant, dtype, backend)
        yield result
        if not isinstance(result, Right):
            return


def check(variant: Variant, dtype: str, backend: str) -> Right | Wrong | Unusable:
    """One line with one dtype: all problems, until one goes wrong."""
    closest, count = 0.0, 0
    try:
        for problem in problems.problems(variant):
            try:
                agreements = problems.check(variant, dtype, backend, problem)
            except (EmulatorCompileError, KernelError):
                raise
            except (EmulatorError, RuntimeError) as error:
                hint = "\nWith --backend emulator it is told at which line." if backend == "cuda" else ""
                return Wrong(variant, dtype, str(problem), f"{error}{hint}")
            for agreement in agreements:
                if not agreement.ok or agreement.wrong:
                    return Wrong(variant, dtype, str(problem), str(agreement.wrong or agreement))
                closest = max(closest, agreement.error / agreement.bound if agreement.bound else 0.0)
            count += 1
    except EmulatorCompileError as error:
        return Unusable(tidy(str(error)))
    except KernelError as error:
        return Unusable(str(error))
    return Right(variant, dtype, count, closest)


def tidy(log: str) -> str:
    """A host compiler's message: the errors, with file and line and the source below, without what led up to them."""
    errors: list[str] = []
    for line in log.splitlines()[1:]:
        if line.startswith(("options: ", "compiler: ")):
            break
        if "error:" in line or (errors and line.startswith(" ")):
            errors.append(line)
    return "\n".join(errors[:12]) or log


def _costs_of_all(variants: tuple[Variant, ...], origin: Variant | None, arch: str) -> Iterator[Event]:
    from ..cuda.machine_code import ToolMissing

    def cost(kernel: tuple[Variant, str]) -> Cost:
        variant, dtype = kernel
        other = same_dtype(origin, dtype)
        return Cost(
            variant, dtype, costs.costs(variant, dtype, arch), costs.costs(other, dtype, arch) if other else None
        )

    with ThreadPoolExecutor(2) as pool:  # the tools are programs of their own
        try:
            yield from pool.map(cost, kernels(variants))
        except ToolMissing as error:
            yield Note(f"no machine code: {error}")
        except (KernelError, RuntimeError) as error:
            yield Unusable(str(error))
