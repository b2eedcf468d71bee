"""Memory, host overhead and start-up: runs the probes and prints their tables."""

from __future__ import annotations

import os
import statistics
import tempfile
from typing import Any

from benchlib import report
from benchlib.probe import in_fresh_process
from benchlib.settings import Settings

STEPS = ("forward", "forward_grad", "forward_backward")


def memory(settings: Settings) -> list[dict[str, Any]]:
    """Peak memory of one head of length 8192 with 64 channels in float32, beside cdist's."""
    length = 2048 if settings.quick else 8192
    records: list[dict[str, Any]] = []
    for name in [peer for peer in ("ours", "cdist") if peer in settings.peers]:
        for op in ("forward", "backward"):
            options = ("--device", settings.device, "--peer", name, "--op", op, "--length", str(length))
            found = in_fresh_process("memory", *options)
            records.append({"peer": name, "op": op, "length": length, **found})
    print(f"\nPeak memory at (1, {length}, {length}, 64) float32, MiB; beyond: neither inputs nor outputs")
    lines = []
    for r in records:
        figures = [report.number(r.get(key)) for key in ("peak_mib", "outputs_mib", "extra_mib")]
        lines.append([r["peer"], r["op"], *figures, r.get("error", "")])
    print(report.table(["peer", "op", "added", "outputs", "beyond", "note"], lines), flush=True)
    return records


def overhead(settings: Settings) -> list[dict[str, Any]]:
    """Time of a call so small that only the way to the kernel counts."""
    calls = "300" if settings.quick else "2000"
    records = []
    peers = [peer for peer in ("ours", "eager", "cdist") if peer in settings.peers]
    for name in ["empty", *peers, *(["attention"] if "ours" in peers else [])]:
        found = in_fresh_process("overhead", "--device", settings.device, "--calls", calls, "--peer", name)
        records.append({"peer": name, **found})
    print(f"\nA call on (1, 16, 16, 16) float32 on one thread, median of {calls}, us")
    print("empty: a torch op that only allocates")
    print("attention: l1_attention of the same, key being value")
    lines = [[r["peer"], *(report.number(r.get(key)) for key in STEPS), r.get("error", "")] for r in records]
    print(report.table(["peer", "forward", "for gradients", "forward+backward", "note"], lines), flush=True)
    return records


def startup(settings: Settings) -> dict[str, Any]:
    """Import time, and first calls with empty and with filled caches of compiled code, in seconds."""
    imports = [in_fresh_process("import") for _ in range(1 if settings.quick else 5)]
    times = [run["seconds"] for run in imports if "seconds" in run]
    result: dict[str, Any] = {"import": {**imports[0], "seconds": statistics.median(times) if times else None}}
    with tempfile.TemporaryDirectory() as caches:
        result["empty caches"] = in_fresh_process("first-call", "--device", settings.device, caches=caches)
        result["cached_files"] = sum(len(files) for _, _, files in os.walk(caches))
        result["filled caches"] = in_fresh_process("first-call", "--device", settings.device, caches=caches)
    imported = result["import"]
    pulled_in = ", ".join(imported.get("pulled_in", [])) or "none of numba, torch, cupy"
    note = imported.get("error", f"imports {pulled_in}")
    lines = [["import l1attn_cupy", report.number(imported["seconds"]), "-", "-", note]]
    for name in ("empty caches", "filled caches"):
        run = result[name]
        figures = [report.number(run.get(key)) for key in ("forward", "forward_backward", "again")]
        lines.append([f"call, {name}", *figures, run.get("error", f"{result['cached_files']} files cached")])
    print("\nStart-up, seconds, each line a new process")
    print(report.table(["", "first", "then forward+backward", "once more", "note"], lines), flush=True)
    return result
