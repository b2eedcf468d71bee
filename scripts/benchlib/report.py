"""What is printed and written: the machine, aligned tables, JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from benchlib.peers import OURS
from benchlib.timing import Row

PACKAGES = (
    "l1attn_cupy",
    "numpy",
    "numba",
    "llvmlite",
    "torch",
    "scipy",
    "scikit-learn",
    "pykeops",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuvs-cu12",
    "cuvs-cu13",
)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned plain text: first column to the left, numbers to the right, the last column as it comes."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(line: list[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        return "  ".join([*cells, line[-1]]).rstrip()

    return "\n".join(aligned(line) for line in lines)


def number(value: float | None, suffix: str = "") -> str:
    """Three significant digits without an exponent, or a dash."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{suffix}"


def spread(low: float | None, high: float | None) -> str:
    """min..max"""
    return "-" if low is None or high is None else f"{number(low)}..{number(high)}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def detailed(rows: list[Row], cuda: bool) -> str:
    """All of one case: a line per op and peer."""
    header = [
        "op",
        "peer",
        "1e9 terms/s",
        "min..max",
        "n",
        "ms",
        "of limit",
        "GB/s" if cuda else "by core time",
    ]
    lines = []
    order = {"forward": 0, "backward": 1, "forward+backward": 2}
    for row in sorted(rows, key=lambda row: order[row.op]):
        figures = [number(row.median), spread(row.low, row.high), row.samples, number(row.milliseconds)]
        last = number(row.gigabytes_per_second) if cuda else percent(row.share_by_core_time)
        shares = [percent(row.share_of_limit), last, number(row.ours_is_faster_by, "x")]
        lines.append([row.op, row.peer, *figures, *shares, row.note])
    return table([*header, "ours is faster by", "note"], lines)


def compact(rows: list[Row]) -> str:
    """A line per shape: our rates, their share of the limit by core time, and over each peer's."""
    cells = {(row.shape, row.op, row.peer): row for row in rows}
    header, columns = ["shape"], []
    for op in ("forward", "forward+backward"):
        peers = list(dict.fromkeys(row.peer for row in rows if row.op == op))
        if OURS in peers:
            others = [peer for peer in peers if peer != OURS]
            columns.append((op, others))
            header += [op, "min..max", "of limit", *(f"/ {peer}" for peer in others)]
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        line: list[object] = ["x".join(map(str, shape))]
        for op, others in columns:
            own = cells.get((shape, op, OURS)) or Row(shape, "", "", op, OURS)
            share = own.share_by_core_time or own.share_of_limit
            line += [number(own.median), spread(own.low, own.high), percent(share)]
            found = [cells.get((shape, op, peer)) for peer in others]
            line += [number(row.ours_is_faster_by if row else None, "x") for row in found]
        lines.append(line)
    notes = dict.fromkeys(f"{row.peer}: {row.note}" for row in rows if row.note and row.median is None)
    return "\n".join([table(header, lines), *notes])


def slower_than(rows: list[Row], peer: str) -> list[str]:
    """Shapes and ops where ours was slower than `peer` in the median round."""
    behind = [row for row in rows if row.peer == peer and (row.ours_is_faster_by or 1.0) < 1.0]
    return [f"{'x'.join(map(str, row.shape))} {row.dtype} {row.op}" for row in behind]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Name of the CPU model, also LLVM's, the number of cores this process may use, and the width of their vectors."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    import llvmlite.binding as llvm

    from benchlib.limit_cpu import vector_bytes  # imports Numba

    return f"{name} ({llvm.get_host_cpu_name()}), {cores} cores, {platform.machine()}, {8 * vector_bytes()}-bit vectors"


class Neighbours:
    """How much of the cores went to other processes, or to other machines on the same host."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """(all, busy, stolen) seconds of all cores since boot, or None where there is no /proc."""
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4] - ticks[7]) / second, ticks[7] / second

    def describe(self) -> str:
        """One clause for the last line of a run."""
        end = self._read()
        if self.start is None or end is None:
            return "not known on this system"
        total, busy, stolen = (b - a for a, b in zip(self.start, end, strict=True))
        own = sum(os.times()[:4])
        others = max(0.0, busy - own) / total
        return f"other processes had {percent(others)} of the cores, other machines {percent(stolen / total)}"
