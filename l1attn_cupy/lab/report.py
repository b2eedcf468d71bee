"""`lab report`: all variants of an op on one page: a roofline, the limits, peers, and instructions per term.

Rates come from the GPU, if there is one. Otherwise each variant stands where its machine code allows at most: the limit
times its budget over all the instructions it issues for a term; the page says so. Peers, and limits that were measured,
come from what ``scripts/bench.py --json`` wrote.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..cuda import machine_code, registry
from ..cuda.machine_code import KINDS, ToolMissing
from ..cuda.registry import KernelError, Variant
from ..plan import ITEMSIZE
from . import checking, child, costs, problems, screen, timing
from .costs import Costs
from .shapes import Shape


class Chip(NamedTuple):
    """A chip of an architecture: multiprocessors, clock in Hz, bytes/s, float32 and float64 lanes of each."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    lanes: int
    lanes64: int


#: From the data sheets, for pages that are made without a GPU.
CHIPS = {
    "75": Chip("T4", 40, 1.59e9, 320e9, 64, 2),
    "80": Chip("A100 80GB", 108, 1.41e9, 2.039e12, 64, 32),
    "86": Chip("RTX 3090", 82, 1.695e9, 936e9, 128, 2),
    "89": Chip("RTX 4090", 128, 2.52e9, 1.008e12, 128, 2),
    "90": Chip("H200", 132, 1.98e9, 4.8e12, 128, 64),
    "120": Chip("RTX 5090", 170, 2.407e9, 1.792e12, 128, 2),
}


class Point(NamedTuple):
    """A variant: terms per second, and how that is known."""

    variant: Variant
    costs: Costs | None
    rate: float | None
    measured: bool


class Roofs(NamedTuple):
    """Terms/s that arithmetic allows and bytes/s of memory, and where both come from."""

    terms: float
    bandwidth: float
    source: str


class Page(NamedTuple):
    """Everything on the page."""

    op: str
    dtype: str
    shape: Shape
    arch: str
    roofs: Roofs
    points: list[Point]
    peers: list[tuple[str, float]]


def write(op: str, dtype: str, shape: Shape, arch: str | None, bench: Path | None, output: Path) -> None:
    """Make the page as a self-contained HTML or PNG file.

    Raises
    ------
    KernelError
        The op is not known to the lab, or there are neither a GPU nor tools for machine code.
    ValueError
        ``output`` is neither .html nor .png, or in no folder, or ``bench`` cannot be read.
    """
    if output.suffix not in (".html", ".png"):
        raise ValueError(f"--output must end in .html or .png, got {output}")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output must lie in a folder that exists, got {output}")
    if op not in problems.OPS:
        raise KernelError(f"the lab cannot report on {op} yet, only on {', '.join(problems.OPS)}")
    page = gather(op, dtype, shape, arch, _read(bench) if bench else {})
    picture = draw(page, "png" if output.suffix == ".png" else "svg")
    output.write_bytes(picture if output.suffix == ".png" else as_html(page, picture).encode())


def terms_per_byte(op: str, dtype: str, shape: Shape) -> float:
    """Of a call that moves nothing twice."""
    return problems.OPS[op].terms * shape.pairs / (ITEMSIZE[dtype] * problems.OPS[op].numbers(shape))


# ---- figures ------------------------------------------------------------------------------------------------------


def gather(op: str, dtype: str, shape: Shape, arch: str | None, bench: dict[str, Any]) -> Page:
    """Measure or look up all that the page shows."""
    found = [v for v in registry.variants(op) if v.fits(dtype, shape.sizes)]
    measured = _measure(found, dtype, shape)
    arch = arch or (measured.arch if measured else costs.ARCH)
    roofs = measured.roofs if measured else _roofs(op, dtype, arch, bench)
    intensity, points = terms_per_byte(op, dtype, shape), []
    for at, variant in enumerate(found):
        known = _costs(variant, dtype, arch)
        slots = known.slots_per_term if known else None
        possible = min(roofs.terms * _budget(op, dtype) / slots, roofs.bandwidth * intensity) if slots else None
        points.append(Point(variant, known, measured.rates[at] if measured else possible, measured is not None))
    if not any(point.rate for point in points):
        raise KernelError(
            f"no variant of {op} for {dtype} can be placed: {machine_code.missing() or 'no term is found'}"
        )
    return Page(op, dtype, shape, arch, roofs, points, list(_peers(op, dtype, shape, bench)))


class Measured(NamedTuple):
    """What a GPU says: its roofs, its architecture, and the rate of each variant."""

    roofs: Roofs
    arch: str
    rates: list[float]


def measure(found: list[Variant], dtype: str, shape: Shape) -> Iterator[Measured | None]:
    """Runs in a child; None without a GPU."""
    used = checking.choose_backend(None)
    if used.backend != "cuda":
        yield None
        return
    from . import gpu

    timed = timing.rank({str(at): variant for at, variant in enumerate(found)}, dtype, shape)
    op = problems.OPS[found[0].op]
    limit = 1e9 / gpu.CudaLimit(op.limit, dtype).seconds_per_1e9_terms()
    roofs = Roofs(limit, gpu.CudaClock().copy_bandwidth(), f"measured on {used.note}")
    yield Measured(roofs, used.arch, [one.rate for one in timed])


def _measure(found: list[Variant], dtype: str, shape: Shape) -> Measured | None:
    event = child.first(measure, found, dtype, shape, limit=600.0)
    if isinstance(event, child.Died):
        raise KernelError(event.message)
    return event


def _budget(op: str, dtype: str) -> float:
    """Instructions of a term at the roof: two terms to an instruction in float16, four of bytes."""
    plain = machine_code.BYTES_BUDGET if dtype in registry.BYTES.values() else machine_code.BUDGETS[op]
    return plain / 2 if dtype == "float16" else plain


def _roofs(op: str, dtype: str, arch: str, bench: dict[str, Any]) -> Roofs:
    """From a benchmark's file if it has the limit, else from the data sheet."""
    if arch not in CHIPS:
        raise ValueError(f"--arch must be one of {', '.join(CHIPS)} for a report, got {arch}")
    chip = CHIPS[arch]
    for limit in bench.get("limits", ()):
        if (limit["op"], limit["dtype"]) == (problems.OPS[op].limit, dtype):
            source = f"arithmetic measured on {bench['device']}, memory from the data sheet of {chip.name}"
            return Roofs(limit["median"] * 1e9, chip.bandwidth, source)
    lanes = {"float64": chip.lanes64, "int8": chip.lanes / 2, "uint8": chip.lanes / 2}.get(dtype, chip.lanes)
    terms = chip.multiprocessors * lanes * chip.clock / _budget(op, dtype)
    return Roofs(terms, chip.bandwidth, f"from the data sheet of {chip.name}")


def _costs(variant: Variant, dtype: str, arch: str) -> Costs | None:
    try:
        return costs.costs(variant, dtype, arch)
    except (ToolMissing, KernelError):
        return None


def _read(bench: Path) -> dict[str, Any]:
    try:
        found = json.loads(bench.read_text())
        return found.get("bench", found)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--bench must be a file that scripts/bench.py --json wrote, got {bench}: {error}") from None


def _peers(op: str, dtype: str, shape: Shape, bench: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and terms/s of what else was timed for this op, dtype and shape."""
    for row in bench.get("rows", ()):
        same = (row["op"], row["dtype"], tuple(row["shape"])) == (problems.OPS[op].bench, dtype, tuple(shape))
        if same and row["median"]:
            name = "l1attn_cupy" if row["peer"] == "ours" else row["peer"]
            yield f"{name}, benchmark", row["median"] * 1e9


# ---- the page -----------------------------------------------------------------------------------------------------

_COLOURS = dict(zip((*KINDS, "other"), ("#2a6f97", "#61a5c2", "#e09f3e", "#9e2a2b", "#8d99ae", "#ced4da", "#e9ecef"),
                    strict=True))  # fmt: skip


def per_term(found: Costs | None) -> dict[str, float]:
    """Instructions of the hot loop for each term by kind; none where they are not known."""
    return {kind: count / found.terms for kind, count in found.kinds.items()} if found and found.terms else {}


def label(point: Point) -> str:
    return f"{point.variant.name}:{point.variant.line}"


def draw(page: Page, kind: str) -> bytes:
    """The roofline, and beside it the instructions of each variant's hot loop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_roofline(left, page)
    _draw_instructions(right, page)
    figure.suptitle(f"{page.op}, {page.dtype}, {page.shape} — {page.roofs.source}", fontsize=11)
    held = io.BytesIO()
    figure.savefig(held, format=kind, dpi=110)
    return held.getvalue()


def _draw_roofline(axes: Any, page: Page) -> None:
    intensity = terms_per_byte(page.op, page.dtype, page.shape)
    ridge = page.roofs.terms / page.roofs.bandwidth  # where both roofs meet
    ends = [min(intensity, ridge) / 8, max(intensity, ridge) * 4]
    axes.loglog([ends[0], ridge, ends[1]], [page.roofs.bandwidth * ends[0], page.roofs.terms, page.roofs.terms], "k-")
    axes.text(ends[1], page.roofs.terms * 1.05, f"limit {page.roofs.terms:.3g} terms/s", ha="right")
    axes.axvline(intensity, color="#ced4da", linestyle=":", zorder=0)
    for at, point in enumerate(p for p in page.points if p.rate):
        how = "" if point.measured else " at most"
        rate = point.rate or 0.0
        share = f"{label(point)}{how} {rate / page.roofs.terms:.0%}"
        axes.plot(intensity, rate, "o" if point.measured else "v", color=f"C{at}", label=share)
    for at, (name, rate) in enumerate(page.peers):
        axes.plot(intensity, rate, "x", color=f"C{at}", label=f"{name} {rate / page.roofs.terms:.2%}")
    axes.set(xlabel="terms for each byte that must be moved", ylabel="terms/s", title="Roofline")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _draw_instructions(axes: Any, page: Page) -> None:
    known = [point for point in reversed(page.points) if per_term(point.costs)]
    for row, point in enumerate(known):
        start = 0.0
        for kind, width in per_term(point.costs).items():
            axes.barh(row, width, left=start, color=_COLOURS[kind], label=kind)
            start += width
        budget = machine_code.budget(point.variant)
        axes.plot([budget, budget], [row - 0.45, row + 0.45], "k-", linewidth=2, label="budget")
    axes.set_yticks(range(len(known)), [label(point) for point in known])
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="best")
    axes.set(xlabel="instructions for each term", title=f"Hot loop on sm_{page.arch}")


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}img{max-width:100%}"""


def as_html(page: Page, picture: bytes) -> str:
    """One file, the picture inside."""
    image = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
    heads = ["variant", "parameters", "terms/s", "of limit", *(c.strip() for c in screen.COST_COLUMNS)]
    rows = [_cells(page, point) for point in page.points]
    peers = [[name, "", f"{rate:.3g}", f"{rate / page.roofs.terms:.2%}"] for name, rate in page.peers]
    how = ("Rates were measured on the GPU, all variants in turn." if page.points[0].measured else
           "Nothing was run: rates are what machine code allows at most, the limit times the budget of a term over all "
           "the instructions that are issued for it.")  # fmt: skip
    title = html.escape(f"{page.op}, {page.dtype}, {page.shape}")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>
<h1>{title}</h1>
<p>{html.escape(how)} Limits: {html.escape(page.roofs.source)}; {page.roofs.terms:.3g} terms/s,
{page.roofs.bandwidth:.3g} bytes/s. A term is one |q - k| added to one sum, or one sign(q - k) used for a gradient.</p>
<img alt="Roofline, and instructions per term" src="{image}">
{_table(heads, rows)}
{_table(["peer", "", "terms/s", "of limit"], peers) if peers else "<p>No peers: give --bench a file for them.</p>"}
</html>
"""


def _cells(page: Page, point: Point) -> list[str]:
    rate = "-" if point.rate is None else f"{point.rate:.3g}"
    share = "-" if point.rate is None else f"{point.rate / page.roofs.terms:.0%}"
    cells = screen.cost_cells(point.costs, point.variant) if point.costs else ["-"] * len(screen.COST_COLUMNS)
    return [label(point), screen.parameters(point.variant), rate, share, *cells]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(heads, "th") + "".join(line(row, "td") for row in rows) + "</table>"
