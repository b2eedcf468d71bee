"""How the lab writes on the terminal: tables, numbers, and one place that decides how wide."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cuda import machine_code
from ..cuda.registry import Variant
from .costs import Costs

_SHORT_LIMIT = {"registers": "regs", "shared memory": "smem"}
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int8": "i8", "uint8": "u8"}


def console(stderr: bool = False) -> Console:
    """Where nobody reads along (a pipe, a file) lines are as long as they need to be."""
    reads = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if reads or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not reads)


def table(*columns: str, title: str = "") -> Table:
    """Columns without lines; those whose name begins with a space are numbers, which no narrow terminal cuts."""
    made = Table(
        box=None, pad_edge=False, collapse_padding=True, title=title or None, title_justify="left", header_style="bold"
    )
    for column in columns:
        numbers = column.startswith(" ")
        made.add_column(column.strip(), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return made


def number(value: float | None) -> str:
    """Three significant digits, or all in front of the point, or a dash."""
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def parameters(variant: Variant, values: Mapping[str, int] | None = None) -> str:
    """As the header has them, with lists, or with the ``values`` chosen from these."""
    chosen = {**variant.parameters, **(values or {})}
    lists = {} if values is not None else variant.choices
    return " ".join(f"{key}={','.join(map(str, lists.get(key, (value,))))}" for key, value in chosen.items())


COST_COLUMNS = (
    " regs", " spills", " shared", " occ.", "limit", " arith", " smem", " gmem", " int", " other", " all", " budget",
)  # fmt: skip


def cost_cells(costs: Costs, variant: Variant) -> list[str]:
    """For `COST_COLUMNS`: resources, then instructions of the hot loop per term by kind."""
    found = costs.resources
    share, limit = costs.occupancy.share, costs.occupancy.limit
    cells = [
        str(found.registers),
        str(found.spilled),
        str(found.shared),
        f"{share:.0%}",
        _SHORT_LIMIT.get(limit, limit),
    ]
    if not costs.terms:
        return [*cells, *["-"] * 6, number(machine_code.budget(variant))]
    per_term = {kind: count / costs.terms for kind, count in costs.kinds.items()}
    named = [per_term.pop(kind, 0.0) for kind in ("arithmetic", "shared memory", "global memory", "integer")]
    figures = [*named, sum(per_term.values()), costs.slots_per_term]
    return [
        *cells,
        *(f"{figure:.2f}" for figure in figures if figure is not None),
        number(machine_code.budget(variant)),
    ]


def bullet(sign: str, style: str, text: str) -> Text:
    """A word that catches the eye, and text beside it."""
    first, *more = text.splitlines() or [""]
    beside = "".join(f"\n{' ' * 9}{line}" for line in more)
    return Text.assemble((f"{sign:9}", style), first, beside, overflow="fold")


def joined(names: Sequence[str]) -> str:
    """Dtypes as the headers write them."""
    return ",".join(SHORT[name] for name in names)
