"""The files of results in benchmarks/: read, and checked as far as what is shown of them needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
LISTS = {"rows": ("shape", "dtype", "op", "peer", "median"), "limits": ("op", "dtype", "median")}
GROWTH = ("peer", "kind", "length", "heads", "ms", "beyond_mib")


class BadFile(Exception):
    """A file of results that cannot be used, and why."""


def files(folder: Path = FOLDER) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every file and what it holds, by name."""
    for file in sorted(folder.glob("*.json")):
        yield file, load(file)


def load(file: Path) -> dict[str, Any]:
    """What ``bench.py --json`` wrote, or that part of what gpu_suite.sh wrote.

    Raises
    ------
    BadFile
        It cannot be read, is no JSON, or lacks what tables and pictures are made from.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadFile(
            f"{file} must be JSON that scripts/bench.py --json or scripts/gpu_suite.sh wrote: {error}"
        ) from error
    if isinstance(found, dict):
        found = found.get("bench", found)
    if not isinstance(found, dict) or not isinstance(found.get("device"), str) or "versions" not in found:
        raise BadFile(f'{file} must have "device" and "versions", as scripts/bench.py --json writes them')
    for name, keys in LISTS.items():
        _check(file, name, found.get(name, []), keys)
    growth = found.get("growth", {"records": []})
    if not isinstance(growth, dict):
        raise BadFile(f'{file}: "growth" must be an object, got {type(growth).__name__}')
    _check(file, "growth.records", growth.get("records"), GROWTH)
    return found


def pictures_of(stem: str, found: dict[str, Any]) -> dict[str, str]:
    """Name of each picture that ``found`` has the figures for -> what it shows."""
    pictures = {}
    if found.get("limits") and any(row["median"] for row in found.get("rows", ())):
        pictures[f"{stem}-roofline.png"] = f"Terms per second on {found['device']} beside the measured limits"
    if found.get("growth", {}).get("records"):
        pictures[f"{stem}-lengths.png"] = f"Time and memory by length on {found['device']}, ours beside others"
    return pictures


def _check(file: Path, name: str, records: Any, keys: tuple[str, ...]) -> None:
    """It is a list of objects that have these keys."""
    if not isinstance(records, list):
        raise BadFile(f'{file}: "{name}" must be a list, got {type(records).__name__}')
    for record in records:
        missing = [key for key in keys if key not in record] if isinstance(record, dict) else list(keys)
        if missing:
            raise BadFile(f'{file}: every one of "{name}" must have {", ".join(keys)}; one lacks {", ".join(missing)}')
