"""`lab list`: every op and variant, what it takes from a multiprocessor, and which one a call would use."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.text import Text

from ..cuda import devices, machine_code, registry, tuning
from ..cuda.registry import KernelError, Variant
from . import costs, screen
from .shapes import Shape


def show(out: Console, ops: Sequence[str], dtype: str | None, shape: Shape | None, arch: str) -> None:
    """Print a table for each op, and below it which variant ``shape`` would get, if there is one."""
    missing = machine_code.missing()
    for op in ops:
        title = (
            f"{op}: registers, shared memory and occupancy on sm_{arch} for {dtype or 'the first dtype of each line'}"
        )
        made = screen.table("file", "dtypes", "sizes", " rank", " regs", " shared", " occ.", title=title)
        below = screen.table("variant", "parameters")
        found = [v for v in registry.variants(op) if dtype in (None, *v.dtypes)]
        for variant in track(found, f"compiling {op}", console=screen.console(stderr=True), transient=True):
            made.add_row(*_row(variant, dtype or variant.dtypes[0], arch, bool(missing)))
            below.add_row(f"{variant.name}:{variant.line}", screen.parameters(variant))
        out.print(made)
        out.print(below)
        if shape:
            for kind in [dtype] if dtype else registry.dtypes_of(op).values():
                out.print(Text(f"  {why(op, kind, shape)}"))
        out.print()
    if missing:
        out.print(screen.bullet("note", "dim", f"no registers, shared memory and occupancy: {missing}"))
    stale = [entry.where for entry in tuning.entries() if not _used(entry)]
    if stale:
        out.print(screen.bullet("note", "dim", f"tuning entries that fit no kernel any more: {', '.join(stale)}"))


def _row(variant: Variant, dtype: str, arch: str, missing: bool) -> list[str]:
    sizes = " ".join(f"{name}={value}" for name, value in variant.limits.items())
    file = f"{variant.path.name}:{variant.line}"
    cells = [file, screen.joined(variant.dtypes), sizes or "any", str(variant.rank)]
    if missing:
        return [*cells, "-", "-", "-"]
    try:
        found = costs.costs(variant, dtype, arch)
    except KernelError:
        return [*cells, "does not", "compile:", "lab try"]
    spills = f" ({found.resources.spilled} spilled)" if found.resources.spilled else ""
    return [*cells, f"{found.resources.registers}{spills}", str(found.resources.shared), f"{found.occupancy.share:.0%}"]


def why(op: str, dtype: str, shape: Shape) -> str:
    """Which variant a call gets, its parameters, and the reasons for both."""
    try:
        chosen = registry.choose(op, dtype, shape.sizes, None)
    except ValueError as error:
        return f"{shape} {dtype}: {error}"
    fitting = [v for v in registry.variants(op) if v.fits(dtype, shape.sizes)]
    others = [f"{v.name}:{v.line} ({v.rank})" for v in fitting if v.where != chosen.where]
    reason = (
        f"of {len(fitting)} lines that take it rank {chosen.rank} is the highest" if others else "no other takes it"
    )
    below = f"; then {', '.join(others)}" if others else ""
    file = f"{chosen.path.name}:{chosen.line}"
    return f"{shape} {dtype}: {chosen.name} ({file}), {reason}{below}{_tuned(chosen, dtype, shape)}"


def _tuned(chosen: Variant, dtype: str, shape: Shape) -> str:
    """How the values of its lists are decided."""
    if not chosen.choices:
        return ""
    here = {entry.device for entry in tuning.entries()} | set(devices.names("emulator", "cpu"))
    found = [(device, tuning.entry_for(chosen, dtype, shape.sizes, [device])) for device in sorted(here)]
    told = [
        f"{screen.parameters(chosen, entry.parameters)} on {device} ({entry.where})" for device, entry in found if entry
    ]
    first = " ".join(f"{name}={values[0]}" for name, values in chosen.choices.items())
    return f"; {'; '.join([*told, f'elsewhere {first}, the first of each list'])}"


def _used(entry: tuning.Entry) -> bool:
    return any(v.name == entry.variant and entry.fits(v) for v in registry.variants(entry.op))
