"""`lab try`: what became of a file that somebody has edited, once or again on each save."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..cuda import registry
from ..cuda.registry import KernelError, Variant
from . import checking, child, screen
from .checking import Cost, Done, Note, Read, Right, Unusable, Using, Wrong
from .child import Died
from .shapes import Shape
from .timing import Timed

_POLL = 0.05


class Verdict:
    """What has been said about a file so far, as something to look at."""

    def __init__(self, path: Path, saved: float) -> None:
        self.path = path
        self.saved = saved
        self.events: list = []
        self.first: float | None = None  # seconds from the save until a dtype was known to be right, or the file wrong

    def add(self, event: object) -> None:
        self.events.append(event)
        if self.first is None and isinstance(event, Right | Wrong | Unusable | Died):
            self.first = time.time() - self.saved

    @property
    def right(self) -> bool:
        return any(isinstance(event, Done) and event.right for event in self.events)

    def parts(self) -> Iterator[RenderableType]:
        """In the order in which they come; tables once they are complete."""
        for event in self.events:
            if (line := self.line(event)) is not None:
                yield line
        yield from _tables(self.events)
        if any(isinstance(event, Done | Died) for event in self.events):
            yield self.summary()

    def line(self, event: object) -> RenderableType | None:
        """What to say of an event at once; None where a table or the summary says it."""
        match event:
            case Read(variants, origin):
                like = f", like {origin.path.name}" if origin else ""
                return Text(f'{self.path.name}: variant "{variants[0].name}" of {variants[0].op}{like}', style="bold")
            case Using("emulator", note, _):
                return Text(f"by emulation on the CPU ({note}): every access to memory is checked, nothing is timed")
            case Using(_, note, _):
                return Text(f"on the GPU, {note}")
            case Right(variant, dtype, count, closest):
                text = f"{dtype}, line {variant.line}: {count} problems, errors at most {closest:.2f} of their bound"
                return screen.bullet("right", "bold green", text)
            case Wrong(variant, dtype, problem, message):
                place = f"{dtype}, {self.path.name}:{variant.line}: {problem}"
                return screen.bullet("WRONG", "bold red", f"{place}\n{message}")
            case Unusable(message) | Died(message):
                return screen.bullet("ERROR", "bold red", message)
            case Note(message):
                return screen.bullet("note", "dim", message)
        return None

    def summary(self) -> Text:
        """The last line."""
        if not self.right:
            return Text("Not right yet: nothing was timed.", style="bold red")
        variants = next(event.variants for event in self.events if isinstance(event, Read))
        return Text(f"All right. {how_to_use(variants[0])}", style="bold green")


def how_to_use(variant: Variant) -> str:
    """What to set and to write for a call to get ``variant``."""
    try:
        known = variant.path.parent.resolve() in [folder.resolve() for folder in registry.folders()]
    except KernelError:
        known = False
    setting = "" if known else f" with L1ATTN_KERNELS={variant.path.parent.resolve()}"
    return f'Use it by variant="{variant.name}"{setting}.'


def _tables(events: Iterable) -> Iterator[RenderableType]:
    costs = [event for event in events if isinstance(event, Cost)]
    if costs:
        arch = costs[0].costs.arch
        title = f"machine code for sm_{arch}; from arith on, instructions of the hot loop per term"
        made = screen.table(" line", *screen.COST_COLUMNS, title=title)
        for event in costs:
            name = f"{event.variant.line} {screen.SHORT[event.dtype]}"
            made.add_row(name, *screen.cost_cells(event.costs, event.variant))
            if event.origin:
                made.add_row("before", *screen.cost_cells(event.origin, event.variant), style="dim")
        yield made
    timings = [event for event in events if isinstance(event, Timed)]
    if timings:
        made = screen.table("dtype", "kernel", " ms", " 1e9 terms/s", " of limit", " this is faster by",
                            title=f"time on the GPU for {timings[0].shape}")  # fmt: skip
        for timed in timings:
            name = {"this": timed.variant.name, "origin": f"{timed.variant.name} (copied from)",
                    "default": f"{timed.variant.name} (default)"}[timed.role]  # fmt: skip
            share = "-" if timed.share is None else f"{timed.share:.0%}"
            made.add_row(timed.dtype, name, screen.number(timed.milliseconds), screen.number(timed.rate / 1e9), share,
                         "" if timed.role == "this" else f"{timed.ratio:.2f}x")  # fmt: skip
        yield made


# ---- the command --------------------------------------------------------------------------------------------------


def find(file: str) -> Path:
    """A file by its path, or by its name in the user's folder or among the packaged kernels."""
    given = Path(file)
    if given.is_file():
        return given.resolve()
    for folder in registry.folders():
        for name in (file, f"{file}.cu"):
            if Path(name).name == name and (folder / name).is_file():
                return (folder / name).resolve()
    places = ", ".join(map(str, registry.folders()))
    raise KernelError(f"FILE must be a .cu file, here or in {places}, got {file}")


def events(
    path: Path, backend: str | None, arch: str | None, limit: float, shape: Shape
) -> Generator[object, None, None]:
    """Those of `checking.attempt`, from a child process."""
    return child.stream(checking.attempt, path, backend, arch, limit, shape, limit=limit + child.COMPILING)


def once(path: Path, backend: str | None, arch: str | None, limit: float, shape: Shape) -> bool:
    """Print everything as it comes; whether the file is right."""
    out = screen.console()
    verdict = Verdict(path, time.time())
    for event in events(path, backend, arch, limit, shape):
        verdict.add(event)
        if (line := verdict.line(event)) is not None:
            out.print(line)
    for part in _tables(verdict.events):
        out.print(part)
    out.print(verdict.summary())
    return verdict.right


def watch(path: Path, backend: str | None, arch: str | None, limit: float, shape: Shape) -> None:
    """Again on each save, of the file or of anything else that it depends on, until Ctrl-C."""
    out = screen.console()
    verdict = Verdict(path, time.time())
    try:
        with Live(console=out, auto_refresh=False, screen=out.is_terminal) as live:
            while True:
                stamp = _stamp(path)
                with contextlib.closing(events(path, backend, arch, limit, shape)) as coming:
                    _look(live, out, verdict, coming, stamp)
                while _stamp(path) == stamp:
                    time.sleep(_POLL)
                verdict = Verdict(path, _when_saved(path, stamp))
    finally:
        if out.is_terminal:  # what stood on the screen that is gone now
            out.print(*verdict.parts(), sep="\n")


def _look(live: Live, out: Console, verdict: Verdict, coming: Iterator[object], stamp: tuple) -> None:
    """Show what comes; stop where the file has been saved again, as the rest would be out of date."""
    for event in coming:
        verdict.add(event)
        _show(live, out, verdict)
        if _stamp(verdict.path) != stamp:
            return
    verdict.add(_Waiting())
    _show(live, out, verdict)


class _Waiting:
    """Everything has been said about this text of the file."""


def _show(live: Live, out: Console, verdict: Verdict) -> None:
    """On a terminal one screen; elsewhere a line at the first verdict and everything at the end."""
    waiting = isinstance(verdict.events[-1], _Waiting)
    took = "" if verdict.first is None else f", first verdict after {verdict.first:.2f} s"
    state = "waiting for the next save, Ctrl-C ends" if waiting else "at work"
    head = Text(f"{time.strftime('%H:%M:%S')} {verdict.path.name}: {state}{took}", style="reverse")
    if out.is_terminal:
        live.update(Group(head, *verdict.parts()), refresh=True)
    elif waiting:
        for part in (head, *verdict.parts()):
            out.print(part)
        out.file.flush()


def _stamp(path: Path) -> tuple:
    """Changes when the file does, or another kernel file; an editor may have moved it away for a moment."""
    try:
        state = os.stat(path)
        return state.st_mtime_ns, state.st_size, state.st_ino, _others()
    except OSError:
        return (0, 0, 0, _others())


def _when_saved(path: Path, before: tuple) -> float:
    """When the file was saved; or just now, if it is another one that has changed."""
    now = _stamp(path)
    return now[0] * 1e-9 if now[:3] != before[:3] and now[0] else time.time() - _POLL


def _others() -> int:
    try:
        return registry.generation()
    except KernelError:
        return -1
