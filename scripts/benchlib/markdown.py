"""The README's tables of speed, from the files that ``--json`` and gpu_suite.sh wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchlib.peers import OURS
from benchlib.report import number, percent
from benchlib.saved import FOLDER, ROOT, files, pictures_of

README = ROOT / "README.md"
BEGIN, END = "<!-- bench.py --markdown: begin -->\n", "<!-- bench.py --markdown: end -->"

SCORES = ["`l1_scores`: (B, L, S, E)", "dtype", "pass", "ms", "1e9 terms/s", "of the limit", "times as long"]
GRID = ["`l1_scores`: original shapes", "dtype", "pass", "of the limit", "times as long, over all shapes"]
ATTENTION = ["`l1_attention`: (B, L, S, E)", "dtype", "pass", "ms", "of the limit", "times as long"]
DECODE = ["`l1_attention`, one query: (B, L, S, E)", "ms", "GB/s", "of a copy's"]
GROWTH = ["growth of", "lengths", "a term's time, over that at the first", "MiB beyond, first and last"]
NAMED = {"cpu": ("torch", "numba"), "cuda": ("torch", "cupy-cuda12x", "cupy-cuda13x")}  # versions in a heading
OPS = ("forward", "backward", "forward+backward")

Record = dict[str, Any]


def write() -> None:
    """Put the tables of all files between README's markers."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + tables() + END + rest.split(END)[1])


def tables(folder: Path = FOLDER) -> str:
    """Of every file in ``folder``, by name."""
    return "".join(f"\n{part}\n" for file, found in files(folder) for part in parts(file, found))


def parts(file: Path, found: Record) -> Iterator[str]:
    """Heading, tables, what is missing and pictures of one file."""
    named = NAMED["cuda" if found["device"].startswith("NVIDIA") else "cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name in named)
    command = f", by `{found['command']}`" if "command" in found else ""
    yield f"{found['device']}, {versions}, [{file.name}](benchmarks/{file.name}){command}:"
    rows, attention = found.get("rows", []), found.get("attention", {})
    for header, lines in (
        (SCORES, scores([row for row in rows if row.get("group") != "grid"])),
        (GRID, grid([row for row in rows if row.get("group") == "grid"])),
        (ATTENTION, contest(attention)),
        (DECODE, decode(attention.get("decode", []))),
        (GROWTH, growth(found.get("growth", {}).get("judged", []))),
    ):
        if made := list(lines):
            yield table(header, made)
    if absent := list(missing(rows, attention.get("contest", []))):
        yield "Not timed: " + "; ".join(absent) + "."
    for name, says in pictures_of(file.stem, found).items():
        yield f"![{says}](docs/pictures/{name})"


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def shape_of(record: Record) -> str:
    return f"({', '.join(map(str, record['shape']))})"


def scores(rows: list[Record]) -> Iterator[list[str]]:
    """A line for each call of ours that is not a variant's beside the default, but for one that is used by name."""
    cases = list(dict.fromkeys((*row["shape"], row["dtype"]) for row in rows))
    for row in sorted(rows, key=lambda row: (cases.index((*row["shape"], row["dtype"])), OPS.index(row["op"]))):
        if row["median"] is None or row["peer"] not in (OURS, f"{OURS} half2"):
            continue
        case = [row[key] for key in ("shape", "dtype", "op")]
        peers = [
            f"{other['peer']} {number(row['median'] / other['median'], 'x')}"
            for other in rows
            if other["median"] and OURS not in other["peer"] and [other[k] for k in ("shape", "dtype", "op")] == case
        ]
        name = f'{row["op"]}, `variant="half2"`' if row["peer"] != OURS else row["op"]
        figures = [number(row["milliseconds"]), number(row["median"]), percent(share(row))]
        yield [shape_of(row), row["dtype"], name, *figures, ", ".join(peers) or "-"]


def share(row: Record) -> float | None:
    """Of the limit: by core time where there is one."""
    found: float | None = row["share_by_core_time"] or row["share_of_limit"]
    return found


def grid(rows: list[Record]) -> Iterator[list[str]]:
    """A line for each pass of the original benchmark's shapes: the least and the most over all of them."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for op in OPS:
            some = [row for row in rows if (row["dtype"], row["op"]) == (dtype, op) and row["median"]]
            own = [row for row in some if row["peer"] == OURS]
            shares = [found for row in own if (found := share(row))]
            times: dict[str, list[float]] = {}
            for row in some:
                if row["ours_is_faster_by"]:
                    times.setdefault(row["peer"], []).append(row["ours_is_faster_by"])
            if own:
                beside = [f"{peer} {span(ratios, lambda x: number(x, 'x'))}" for peer, ratios in times.items()]
                yield [f"{len(own)} shapes", dtype, op, span(shares, percent), ", ".join(beside) or "-"]


def span(values: Sequence[float], shown: Any) -> str:
    """The least and the most."""
    return f"{shown(min(values))} to {shown(max(values))}" if values else "-"


def contest(attention: Record) -> Iterator[list[str]]:
    """Ours, forward and with the backward pass; a peer that takes less time has a ratio below 1."""
    records = [record for record in attention.get("contest", []) if record["ms"]]
    for record in records:
        name, dtype = peer_of(record)
        if name != OURS:
            continue
        peers = [
            f"{peer_of(other)[0]} {number(other['ms'] / record['ms'], 'x')}"
            for other in records
            if (other["op"], peer_of(other)[1]) == (record["op"], dtype)
            and peer_of(other)[0] not in (OURS, "scores alone")
        ]
        limit = attention.get("share", {}).get("share") if (record["op"], dtype) == ("forward", "float32") else None
        figures = [number(record["ms"]), percent(limit)]
        yield [shape_of(attention), dtype, record["op"], *figures, ", ".join(peers)]


def peer_of(record: Record) -> tuple[str, str]:
    """Name and dtype."""
    name, _, dtype = record["peer"].partition(", ")
    return name, dtype or "float32"


def decode(records: list[Any]) -> Iterator[list[str]]:
    """Key and value read once, beside the bandwidth of a copy; files without a copy's have no line."""
    for record in records:
        if isinstance(record, dict):
            figures = [number(record["ms"]), number(record["GB/s"]), percent(record["share"])]
            yield [shape_of(record), *figures]


def growth(judged: list[Record]) -> Iterator[list[str]]:
    """How far the time of a term is from what it is at the first length, and the memory at both ends."""
    for one in judged:
        first, last = one["lengths"]
        memory = ", ".join(number(mib) for mib in one["beyond_mib"])
        yield [one["kind"], f"{first:,} to {last:,}", f"{one['least']:.2f} to {one['most']:.2f}", memory]


def missing(rows: list[Record], records: list[Record]) -> Iterator[str]:
    """Peers, not variants of ours, without any figure, and why."""
    for part in (rows, records):
        timed = {record["peer"] for record in part if record.get("median") or record.get("ms")}
        notes = {record["peer"]: record.get("note", "") for record in part if record["peer"] not in timed}
        yield from (f"{peer} ({note.partition(';')[0]})" for peer, note in notes.items() if OURS not in peer)
