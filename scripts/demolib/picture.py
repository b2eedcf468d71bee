"""The picture of a demonstration: every run a thin line, one panel a setting, one colour an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a picture in a file needs no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .model import NAMES

COLORS = {"dot": "#30638e", "inverse": "#d1495b", "negative": "#e09f3e"}


@dataclass(frozen=True)
class Curve:
    """One run: what was measured (y) after how many steps (x)."""

    attention: str
    x: Sequence[int]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Curves on axes of their own; `level` is a horizontal line and what it says."""

    title: str
    curves: Sequence[Curve]
    level: tuple[float, str]


def seeds(number: int) -> str:
    """How many runs there are."""
    return "1 seed" if number == 1 else f"{number} seeds"


def draw_panel(ax: Axes, panel: Panel) -> None:
    """All curves of a panel; the legend says how many runs each colour has."""
    for attention in dict.fromkeys(curve.attention for curve in panel.curves):
        curves = [curve for curve in panel.curves if curve.attention == attention]
        for curve in curves:
            label = f"{NAMES[attention]}, {seeds(len(curves))}" if curve is curves[0] else None
            ax.plot(curve.x, curve.y, color=COLORS[attention], linewidth=1.4, alpha=0.85, label=label)
    height, says = panel.level
    ax.axhline(height, color="0.5", linewidth=1, linestyle=":")
    ax.annotate(says, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4", fontsize=8)
    finish(ax, panel.title)


def finish(ax: Axes, title: str) -> None:
    """What the panels of all pictures have in common."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def draw(
    panels: Sequence[Panel], measured: str, output: Path, *, log: bool = False, highest: float | None = None
) -> None:
    """Write the picture to `output`: panels with common axes, at most two in a row, y named `measured`.

    y ends at `highest`, or at the largest value.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(6.4, 4.6 * columns), 0.4 + 3.0 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        draw_panel(ax, panel)
    if log:
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylim(top=highest)  # all panels share it
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(measured, fontsize=10)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(output, dpi=90)
    plt.close(figure)
