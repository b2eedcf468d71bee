"""The README's tables of speed, from the files that ``--json`` and gpu_suite.sh wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchlib.peers import OURS
from benchlib.report import number, percent

ROOT = Path(__file__).resolve().parents[2]
README, FOLDER = ROOT / "README.md", ROOT / "benchmarks"
BEGIN, END = "<!-- bench.py --markdown: begin -->\n", "<!-- bench.py --markdown: end -->"

SCORES = ["`l1_scores`: (B, L, S, E)", "dtype", "pass", "ms", "1e9 terms/s", "of the limit", "times as long"]
ATTENTION = ["`l1_attention`: (B, L, S, E)", "dtype", "pass", "ms", "times as long"]
NAMED = {"cpu": ("torch", "numba"), "cuda": ("torch", "cupy-cuda12x", "cupy-cuda13x")}  # versions in a heading


def write() -> None:
    """Put the tables of all files between README's markers."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + tables() + END + rest.split(END)[1])


def tables() -> str:
    """Of every file in ``benchmarks/``, by name."""
    return "".join(f"\n{part}\n" for file in sorted(FOLDER.glob("*.json")) for part in _parts(file))


def _parts(file: Path) -> Iterator[str]:
    found = json.loads(file.read_text())
    found = found.get("bench", found)
    named = NAMED["cuda" if found["device"].startswith("NVIDIA") else "cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name in named)
    yield f"{found['device']}, {versions}, [{file.name}](benchmarks/{file.name}):"
    if lines := list(_scores(found.get("rows", []))):
        yield _table(SCORES, lines)
    if lines := list(_attention(**_contest(found))):
        yield _table(ATTENTION, lines)


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _scores(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A line for each call of ours that is not a variant's beside the default, but for one that is used by name."""
    for row in rows:
        if row["median"] is None or row["peer"] not in (OURS, f"{OURS} half2"):
            continue
        case = [row[key] for key in ("shape", "dtype", "op")]
        peers = [
            f"{other['peer']} {number(row['median'] / other['median'], 'x')}"
            for other in rows
            if other["median"] and OURS not in other["peer"] and [other[k] for k in ("shape", "dtype", "op")] == case
        ]
        name = f'{row["op"]}, `variant="half2"`' if row["peer"] != OURS else row["op"]
        share = percent(row["share_by_core_time"] or row["share_of_limit"])
        figures = [number(row["milliseconds"]), number(row["median"]), share]
        yield [f"({', '.join(map(str, row['shape']))})", row["dtype"], name, *figures, ", ".join(peers) or "-"]


def _contest(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found.get("attention", {}).get(key, []) for key in ("shape", "contest")}


def _attention(shape: list[int], contest: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Ours, forward and with the backward pass; a peer that takes less time has a ratio below 1."""
    for record in contest:
        name, dtype = _peer(record)
        if name != OURS:
            continue
        peers = [
            f"{_peer(other)[0]} {number(other['ms'] / record['ms'], 'x')}"
            for other in contest
            if (other["op"], _peer(other)[1]) == (record["op"], dtype) and _peer(other)[0] not in (OURS, "scores alone")
        ]
        yield [f"({', '.join(map(str, shape))})", dtype, record["op"], number(record["ms"]), ", ".join(peers)]


def _peer(record: dict[str, Any]) -> tuple[str, str]:
    name, _, dtype = record["peer"].partition(", ")
    return name, dtype or "float32"
