"""The files of results in benchmarks/: read, and checked as far as what is shown of them needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
_FIGURES = ("median", "milliseconds", "share_by_core_time", "share_of_limit", "ours_is_faster_by")
LISTS = {"rows": ("shape", "dtype", "op", "peer", *_FIGURES), "limits": ("op", "dtype", "median")}
CONTEST = ("op", "peer", "ms")
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
    if not isinstance(found, dict) or not isinstance(found.get("device"), str):
        raise BadFile(f'{file} must have "device", a string, as scripts/bench.py --json writes it')
    if not isinstance(found.get("versions"), dict):
        raise BadFile(f'{file} must have "versions", an object, as scripts/bench.py --json writes it')
    for name, keys in LISTS.items():
        _check(file, name, found.get(name, []), keys)
    for name, records, keys in (("growth", "records", GROWTH), ("attention", "contest", CONTEST)):
        part = found.get(name, {records: []})
        if not isinstance(part, dict):
            raise BadFile(f'{file}: "{name}" must be an object, got {type(part).__name__}')
        _check(file, f"{name}.{records}", part.get(records), keys)
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
