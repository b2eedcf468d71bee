"""The README's pictures, from the files in benchmarks/: a roofline and the growth with the length of each machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demolib.picture import finish, plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchlib.attention_peers import DOT
from benchlib.cases import ITEMSIZE, Case
from benchlib.growth_probe import KINDS
from benchlib.peers import OURS
from benchlib.saved import FOLDER, ROOT, files, pictures_of

PICTURES = ROOT / "docs" / "pictures"
DTYPES = {"float32": "#d1495b", "float16": "#30638e", "bfloat16": "#8d6a9f", "float64": "#e09f3e"}
OTHER_DTYPE = "#6c757d"
# Each peer has a marker and a dash of its own, so that nothing hangs on colour alone.
PEERS = {
    OURS: ("#d1495b", "o", "-"),
    DOT: ("#30638e", "s", "--"),
    "cdist": ("#e09f3e", "^", "-."),
    "compile": ("#6c757d", "D", ":"),
    "keops": ("#8d6a9f", "v", (0, (5, 1, 1, 1, 1, 1))),
}
MARKS = {"scores": ("o", "scores"), "attention": ("s", "attention"), "decode": ("^", "attention, one query")}
LEAST_MIB = 1 / 256  # a page: what is less cannot be seen in a resident set
WIDTH, HEIGHT, DPI = 9.2, 3.2, 90  # inches: of a picture, of a row of panels


@dataclass(frozen=True)
class Point:
    """One measurement in a roofline: terms per byte of least traffic, and 1e9 terms per second."""

    kind: str  # of MARKS
    dtype: str
    intensity: float
    rate: float
    small: bool = False  # one of the many of the grid


def draw_all(folder: Path = FOLDER, output: Path = PICTURES) -> Iterator[Path]:
    """Draw what there is of every file; the pictures that were written."""
    for file, found in list(files(folder)):  # all are read first: a bad one stops it before anything is written
        for name in pictures_of(file.stem, found):
            (draw_roofline if name.endswith("-roofline.png") else draw_lengths)(found, output / name)
            yield output / name


def points(found: dict[str, Any], op: str) -> list[Point]:
    """Of ours, one pass of all shapes and dtypes."""
    made = []
    for row in found.get("rows", ()):
        if row["op"] == op and row["median"] and row["peer"].split()[0] == OURS:
            batch, q_len, k_len, channels = row["shape"]
            case = Case(row.get("group", "user"), batch, q_len, k_len, channels, row["dtype"])
            small = case.group == "grid" or row["peer"] != OURS
            made.append(Point("scores", case.dtype, case.terms(op) / case.bytes_moved(op), row["median"], small))
    if op != "forward":
        return made
    attention = found.get("attention", {})
    for record in attention.get("contest", ()):
        name, _, dtype = record["peer"].partition(", ")
        if (name, record["op"]) == (OURS, op) and record["ms"]:
            made.append(attention_point("attention", attention["shape"], dtype or "float32", record["ms"]))
    for record in attention.get("decode", ()):
        if isinstance(record, dict):
            made.append(attention_point("decode", record["shape"], "float32", record["ms"]))
    return made


def attention_point(kind: str, shape: Sequence[int], dtype: str, milliseconds: float) -> Point:
    """A fused forward: query, key, value and the result are moved once; the terms are those of the scores."""
    batch, q_len, k_len, channels = shape
    moved = 2 * batch * channels * (q_len + k_len) * ITEMSIZE[dtype]
    terms = math.prod(shape)
    return Point(kind, dtype, terms / moved, terms / milliseconds / 1e6)


def bandwidth(found: dict[str, Any]) -> float | None:
    """1e9 bytes per second of a copy, read and written together, where it was measured."""
    decoded = [record for record in found.get("attention", {}).get("decode", ()) if isinstance(record, dict)]
    rates = [found.get("copy, GB/s"), *(record.get("copy, GB/s") for record in decoded)]
    return max((rate for rate in rates if rate), default=None)


def draw_roofline(found: dict[str, Any], output: Path) -> None:
    """A panel for each pass: points of ours under what arithmetic and memory allow."""
    shown = {op: made for op in ("forward", "backward") if (made := points(found, op))}
    roofs = {
        op: [r for r in found["limits"] if r["median"] and r["op"] == op and r["dtype"] in {p.dtype for p in shown[op]}]
        for op in shown
    }
    copied, places = bandwidth(found), [p.intensity for made in shown.values() for p in made]
    ridges = [roof["median"] / copied for every in roofs.values() for roof in every] if copied else []
    reach = (min(places + ridges) / 3, max(places + ridges) * 2)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(WIDTH, HEIGHT + 1), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for ax, op in zip(axes.flat, shown, strict=True):
        for roof in sorted(roofs[op], key=lambda roof: roof["median"]):
            draw_roof(ax, roof, copied, reach)
        for p in sorted(shown[op], key=lambda p: not p.small):
            look: dict[str, Any] = {"s": 12, "alpha": 0.45} if p.small else {"s": 42, "edgecolors": "white"}
            color, marker = DTYPES.get(p.dtype, OTHER_DTYPE), MARKS[p.kind][0]
            ax.scatter(p.intensity, p.rate, marker=marker, color=color, zorder=3, **look)
        ax.set(xscale="log", yscale="log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.set_xlabel("terms per byte that must be moved")
        finish(ax, op)
    figure.supylabel("1e9 terms per second", fontsize=10)
    figure.suptitle(found["device"], fontsize=10)
    figure.legend(
        handles=list(explained(shown, copied)), frameon=False, fontsize=8, loc="outside lower center", ncols=4
    )
    figure.savefig(output, dpi=DPI)
    plt.close(figure)


def draw_roof(ax: Axes, roof: dict[str, Any], copied: float | None, reach: tuple[float, float]) -> None:
    """The limit of one dtype: flat where arithmetic bounds, a slope where a copy's bandwidth does."""
    top, color = roof["median"], DTYPES.get(roof["dtype"], OTHER_DTYPE)
    ridge = top / copied if copied else reach[0]
    ax.plot([ridge, reach[1]], [top, top], color=color, linewidth=1.4, alpha=0.85)
    if copied:
        ax.plot([reach[0], ridge], [copied * reach[0], top], color="0.5", linewidth=1.4, linestyle=":")
    ax.annotate(f"{top:,.0f}", (reach[1], top), ha="right", va="bottom", color=color, fontsize=8)


def explained(shown: dict[str, list[Point]], copied: float | None) -> Iterator[Line2D]:
    """The legend: a colour for each dtype, a marker for each kind, and the slope."""
    line: dict[str, Any] = {"linewidth": 1.4}
    dot: dict[str, Any] = {"color": "0.4", "linestyle": ""}
    every = [p for made in shown.values() for p in made]
    for dtype in dict.fromkeys(p.dtype for p in every):
        yield Line2D([], [], color=DTYPES.get(dtype, OTHER_DTYPE), label=f"{dtype}: limit of arithmetic", **line)
    for kind in dict.fromkeys(p.kind for p in every):
        marker, says = MARKS[kind]
        yield Line2D([], [], marker=marker, markersize=6, label=says, **dot)
    if any(p.small for p in every):
        yield Line2D([], [], marker="o", markersize=3, alpha=0.6, label="scores: variants, small shapes", **dot)
    if copied:
        yield Line2D([], [], color="0.5", linestyle=":", label=f"memory: a copy's {copied:,.0f} GB/s", **line)


def draw_lengths(found: dict[str, Any], output: Path) -> None:
    """A row for each kind: time of one head and its memory, by length, all peers."""
    records = found["growth"]["records"]
    kinds = [kind for kind in KINDS if any(record["kind"] == kind for record in records)]
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(WIDTH, 0.6 + HEIGHT * len(kinds)), squeeze=False, sharex=True, layout="constrained"
    )
    lengths = sorted({record["length"] for record in records})
    for (left, right), kind in zip(axes, kinds, strict=True):
        draw_kind(left, right, [record for record in records if record["kind"] == kind])
        if kind != "scores forward":
            draw_matrix(right, lengths)
        finish(left, f"{kind}: milliseconds")
        finish(right, "its MiB beyond inputs and outputs")
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(lengths[::3] if len(lengths) > 4 else lengths)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    figure.supxlabel("length", fontsize=10)
    channels = found["growth"].get("channels", 64)
    figure.suptitle(f"{found['device']}: one head of {channels} channels, float32", fontsize=10)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(output, dpi=DPI)
    plt.close(figure)


def draw_kind(left: Axes, right: Axes, records: list[dict[str, Any]]) -> None:
    """Time and memory of one head, a line for each peer."""
    for peer, (color, marker, dash) in PEERS.items():
        own = sorted((r for r in records if r["peer"] == peer), key=lambda record: record["length"])
        if own:
            look: dict[str, Any] = {
                "color": color,
                "marker": marker,
                "linestyle": dash,
                "markersize": 4,
                "linewidth": 1.4,
            }
            x = [record["length"] for record in own]
            left.plot(x, [record["ms"] / record["heads"] for record in own], label=peer, **look)
            right.plot(x, [max(LEAST_MIB, record["beyond_mib"]) for record in own], **look)


def draw_matrix(ax: Axes, lengths: Sequence[int]) -> None:
    """What the scores alone would take in float32."""
    size = [n * n / 2**18 for n in lengths]
    ax.plot(lengths, size, color="0.5", linewidth=1, linestyle=":")
    look: dict[str, Any] = {"xytext": (-24, 0), "textcoords": "offset points", "ha": "right", "va": "top"}
    ax.annotate("the matrix of scores", (lengths[-1], size[-1]), color="0.4", fontsize=8, **look)
