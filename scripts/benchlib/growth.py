"""Growth: time of a term and memory as the length doubles from 128 to 65,536, of ours and of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchlib import report
from benchlib.attention_peers import DOT
from benchlib.growth_probe import CHANNELS, KINDS, LONGEST, ROWS, SHORTEST
from benchlib.peers import OURS
from benchlib.settings import Settings

__all__ = ["SHORTEST", "growth"]

CONTENDERS = (OURS, DOT, "cdist", "compile", "keops")
JUDGED_FROM, LONGEST_QUICK = 1024, 4096
ASKED = 0.15  # time of a term at any length, over that at JUDGED_FROM: within 1 - ASKED and 1 + ASKED
LIMIT_S = {"cpu": 240, "cuda": 60}  # of one peer's process

Record = dict[str, Any]


def growth(settings: Settings) -> dict[str, Any]:
    """Print the tables; records of every peer, kind and length, notes of what is missing, and how ours grows."""
    longest = settings.length or (LONGEST_QUICK if settings.quick else LONGEST)
    records: list[Record] = []
    notes: list[Record] = []
    for peer in CONTENDERS:
        if (peer in settings.peers or peer == DOT) and settings.has_time("growth", f"growth of {peer}"):
            found = run_peer(peer, longest, settings)
            records += (record for record in found if "ms" in record)
            notes += (record for record in found if "ms" not in record)
    print(f"\nGrowth with the length, float32, {CHANNELS} channels; as many heads as make {ROWS[settings.device]} rows")
    print("of query, or one. MiB: of one head, beyond inputs and outputs.", flush=True)
    for kind in KINDS:
        print_kind(kind, [record for record in records if record["kind"] == kind])
    for note in notes:
        print(f"{note['peer']}, {note.get('kind', 'all')}: {said(note)}")
    judged = [one for kind in KINDS if (one := judge(kind, records, settings.cuda))]
    print("\n".join(map(describe, judged)), flush=True)
    return {"rows": ROWS[settings.device], "channels": CHANNELS, "records": records, "notes": notes, "judged": judged}


def run_peer(peer: str, longest: int, settings: Settings) -> list[Record]:
    """What a process of its own says of a peer; a later line for a length takes the place of an earlier one."""
    scripts = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "benchlib.growth_probe", "--peer", peer, "--device", settings.device]
    command += ["--length", str(longest), "--rounds", str(settings.rounds), "--threads", str(settings.threads)]
    trouble, limit = "", min(LIMIT_S[settings.device], settings.left_s("growth"))
    with tempfile.TemporaryFile("w+") as printed:
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": path},
                stdout=printed,
                stderr=subprocess.PIPE,
                text=True,
                timeout=limit,
                check=False,
            )
            if done.returncode != 0:
                trouble = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1][:160]
        except subprocess.TimeoutExpired:
            trouble = f"not done after {limit:.0f} s"
        printed.seek(0)
        found = read(printed)
    return [{"peer": peer, **line} for line in (*found, *([{"error": trouble}] if trouble else []))]


def read(lines: Iterable[str]) -> list[Record]:
    """The last of each kind and length, in order of their first."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in lines:
        if line.startswith("{") and line.endswith("}\n"):  # not what a library prints, nor half a line
            record = json.loads(line)
            found[record.get("kind"), record.get("length")] = record
    return list(found.values())


def said(note: Record) -> str:
    """Of a kind that ended before the longest length."""
    where = f"not at length {note['length']}: " if "length" in note else ""
    return where + str(note.get("note", note.get("error")))


def print_kind(kind: str, records: list[Record]) -> None:
    """A line for each length: all of ours, time and memory of one head of the others."""
    cells = {(record["peer"], record["length"]): record for record in records}
    others = [peer for peer in dict.fromkeys(record["peer"] for record in records) if peer != OURS]
    base = cells.get((OURS, JUDGED_FROM), {})
    lines = []
    for length in sorted({record["length"] for record in records}):
        own = cells.get((OURS, length), {})
        ms, heads = own.get("ms"), own.get("heads", "-")
        figures = [report.number(ms), report.spread(own.get("low"), own.get("high")), own.get("samples", 0)]
        terms = [report.number(own.get(key)) for key in ("ps per term", "core ps per term")]
        rates = [*terms, report.number(over(own, base, "ps per term"), "x"), report.number(own.get("beyond_mib"))]
        beside: list[str] = []
        for peer in others:
            found = cells.get((peer, length), {})
            beside += [report.number(over(found, own, "ms"), "x"), report.number(found.get("beyond_mib"))]
        lines.append([length, heads, *figures, *rates, *beside, ""])
    header = ["length", "heads", "ms", "min..max", "n", "ps a term", "by core", f"of {JUDGED_FROM}'s", "MiB"]
    for peer in others:
        header += [f"{peer} takes", "MiB"]
    print(f"\n{kind}\n{report.table([*header, ''], lines)}", flush=True)


def over(record: Record, base: Record, key: str) -> float | None:
    """A ratio, where there is one."""
    return record[key] / base[key] if record.get(key) and base.get(key) else None


def judge(kind: str, records: list[Record], cuda: bool) -> Record | None:
    """How far a term of ours is from its time at JUDGED_FROM, and its memory; on the CPU by core time."""
    own = [r for r in records if (r["peer"], r["kind"]) == (OURS, kind) and r["length"] >= JUDGED_FROM]
    if len(own) < 2 or own[0]["length"] != JUDGED_FROM:
        return None
    key = "ps per term" if cuda else "core ps per term"
    ratios = [record[key] / own[0][key] for record in own]
    lengths = [own[0]["length"], own[-1]["length"]]
    memory = [own[0]["beyond_mib"], own[-1]["beyond_mib"]]
    return {
        "kind": kind,
        "lengths": lengths,
        "by": key,
        "least": min(ratios),
        "most": max(ratios),
        "beyond_mib": memory,
    }


def describe(judged: Record) -> str:
    """A sentence."""
    first, last = judged["lengths"]
    inside = judged["least"] >= 1 - ASKED and judged["most"] <= 1 + ASKED
    how = "by core time, " if judged["by"].startswith("core") else ""
    low, high = (report.number(mib) for mib in judged["beyond_mib"])
    return (
        f"{judged['kind']}: a term takes {judged['least']:.2f} to {judged['most']:.2f} of its time at {first}, "
        f"{how}up to {last}: {'within' if inside else 'NOT within'} {100 * ASKED:.0f} %; {low} to {high} MiB beyond"
    )
