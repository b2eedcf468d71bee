#!/usr/bin/env python3
"""Put what scripts/gpu_suite.sh has found into one JSON file, named by the device; exit status 1 if anything failed.

python scripts/gpu_report.py OUTDIR NAME:STATUS:SECONDS:LIMIT...
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PACKAGES = ("numpy", "numba", "torch", "cupy-cuda12x", "cupy-cuda13x", "ml_dtypes", "triton", "pytest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument("parts", nargs="*", metavar="NAME:STATUS:SECONDS:LIMIT")
    options = parser.parse_args()
    result: dict[str, Any] = {"device": device(), "versions": versions(), "parts": dict(map(_part, options.parts))}
    for name, read in (("tests", tests), ("check", check), ("bench", bench)):
        if name in result["parts"]:
            result[name] = read(options.folder)
    file = options.folder / f"{re.sub(r'[^a-z0-9]+', '-', result['device']['name'].lower())}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    failed = [name for name, part in result["parts"].items() if part["status"] != 0 or "missing" in result[name]]
    print(f"{file}: {'failed: ' + ', '.join(failed) if failed else 'all right'}")
    return int(bool(failed) or not result["parts"])


def _part(text: str) -> tuple[str, dict[str, int]]:
    name, status, seconds, limit = text.split(":")
    return name, {"status": int(status), "seconds": int(seconds), "limit": int(limit)}


def device() -> dict[str, Any]:
    """Name, compute capability, multiprocessors, memory, and the driver."""
    import torch

    if not torch.cuda.is_available():
        return {"name": "no-gpu"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def versions() -> dict[str, str]:
    """Of Python, the packages that are there, and this source tree where git knows it."""
    found = {"python": sys.version.split()[0], "commit": _output("git", "describe", "--always", "--dirty")}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str:
    """The first line that a command prints; "" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def tests(folder: Path) -> dict[str, Any]:
    """How many passed, failed and were skipped and why, from pytest's XML file."""
    try:
        cases = list(ElementTree.parse(folder / "tests.xml").iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {"missing": str(error)}
    outcomes = Counter(next((child.tag for child in case if child.tag in OUTCOMES), "passed") for case in cases)
    skips = Counter(found.get("message", "") for case in cases for found in case.iter("skipped"))
    failures = [case.get("name", "") for case in cases if any(child.tag in ("failure", "error") for child in case)]
    return {**outcomes, "reasons": dict(skips), "failures": failures}


OUTCOMES = ("failure", "error", "skipped")


def check(folder: Path) -> dict[str, Any]:
    """The rows of the table that scripts/check.py prints."""
    rows = [line for line in (folder / "check.log").read_text().splitlines() if re.search(r"\bok$|\bNOT OK\b", line)]
    bad = sum("NOT OK" in row for row in rows)
    return {"ok": len(rows) - bad, "not ok": bad, "rows": rows} if rows else {"missing": "no row in check.log"}


def bench(folder: Path) -> dict[str, Any]:
    """What scripts/bench.py wrote."""
    try:
        return json.loads((folder / "bench.json").read_text())
    except (OSError, ValueError) as error:
        return {"missing": str(error)}


if __name__ == "__main__":
    sys.exit(main())
