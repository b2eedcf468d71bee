"""Which of the values that a ``@variant`` line lists to use: the tuning files, per device, dtype and shape class.

They lie in a folder ``tuning`` beside the kernels, the user's (in L1ATTN_KERNELS) before the packaged one, and are read
again when they change. Each is a JSON list with one entry for each winner::

    [
     {"device": "NVIDIA H200", "op": "scores_forward", "variant": "gather", "dtype": "float32",
      "shape": "L<=1024 S<=1024 E<=64", "parameters": {"BLOCK_K": 64}, "by": "time"}
    ]

``device`` is the name of a card or an architecture, "sm_90"; the card's own entries come first. ``by`` says how the
winner was found: "time", or "machine code" where there was no GPU.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import registry
from .registry import KernelError, Variant

FOLDER = "tuning"

#: Upper ends of the shape classes; beyond the last is one more class.
LENGTHS, CHANNELS = (64, 256, 1024, 4096), (32, 64, 128)

BY = ("time", "machine code")
_TEXTS = ("device", "op", "variant", "dtype", "shape", "by")


@dataclass(frozen=True)
class Entry:
    """The parameters to use for one device, op, variant, dtype and shape class."""

    device: str
    op: str
    variant: str
    dtype: str
    shape: str
    by: str
    parameters: Mapping[str, int] = field(hash=False)
    where: str = field(default="", compare=False)

    @property
    def key(self) -> tuple[str, ...]:
        return self.device, self.op, self.variant, self.dtype, self.shape

    def fits(self, variant: Variant) -> bool:
        """Whether the line of ``variant`` lists all these values."""
        return all(value in variant.choices.get(name, ()) for name, value in self.parameters.items())


def shape_class(sizes: Mapping[str, int]) -> str:
    """The class of a call with ``sizes`` q, k and e: ``"L<=1024 S<=1024 E<=64"``, or ``"L>4096 S>4096 E>128"``."""
    letters = (("L", "q", LENGTHS), ("S", "k", LENGTHS), ("E", "e", CHANNELS))
    return " ".join(_one_class(letter, sizes[key], ends) for letter, key, ends in letters)


def _one_class(letter: str, size: int, ends: Sequence[int]) -> str:
    return next((f"{letter}<={end}" for end in ends if size <= end), f"{letter}>{ends[-1]}")


def tuned(variant: Variant, dtype: str, sizes: Mapping[str, int], devices: Sequence[str]) -> Variant:
    """``variant`` with the parameters for the first of ``devices`` that has an entry; else with its defaults."""
    entry = entry_for(variant, dtype, sizes, devices)
    return variant.with_parameters(entry.parameters) if entry else variant


def entry_for(variant: Variant, dtype: str, sizes: Mapping[str, int], devices: Sequence[str]) -> Entry | None:
    """The entry that decides the parameters of ``variant``: the user's first, then the most particular device's."""
    tables = _entries(registry.generation())  # also where there is nothing to choose: a bad file is an error at once
    shape = shape_class(sizes)
    for folder in tables if variant.choices else ():
        for device in devices:
            entry = folder.get((device, variant.op, variant.name, dtype, shape))
            if entry and entry.fits(variant):
                return entry
    return None


def entries() -> list[Entry]:
    """All entries of all tuning files, the user's first."""
    return [entry for folder in _entries(registry.generation()) for entry in folder.values()]


@functools.lru_cache(maxsize=8)
def _entries(_generation: int) -> tuple[dict[tuple[str, ...], Entry], ...]:
    """For each folder its entries by key. It warns of those of the user's that fit no kernel any more."""
    found = []
    for folder in registry.folders():
        table: dict[tuple[str, ...], Entry] = {}
        for file in sorted(Path(folder, FOLDER).glob("[!.]*.json")):
            for entry in read(file):
                if entry.key in table:
                    raise KernelError(f"{entry.where}: {table[entry.key].where} is already for {', '.join(entry.key)}")
                table[entry.key] = entry
        found.append(table)
        if folder != registry.packaged_folder():  # the packaged entries fit the packaged kernels
            for entry in table.values():
                _warn_if_stale(entry)
    return tuple(found)


def _warn_if_stale(entry: Entry) -> None:
    files = [folder / f"{entry.op}_{entry.variant}.cu" for folder in registry.folders()]
    try:
        lines = next((registry.read(file) for file in files if file.is_file()), ())
    except KernelError:
        return  # an error of those who use that kernel, not of all who look for another
    if not any(entry.fits(variant) for variant in lines):
        chosen = " ".join(f"{name}={value}" for name, value in entry.parameters.items())
        places = ", ".join(variant.where for variant in lines) or f"there is no variant {entry.variant} of {entry.op}"
        warnings.warn(f"{entry.where}: not used, as {chosen} is not listed at {places}; tune again", stacklevel=2)


# ---- files --------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[Entry]:
    """The entries of one file.

    Raises
    ------
    KernelError
        It is no JSON list of entries; names file and line.
    """
    return [_entry(f"{file}:{line}", fields) for line, fields in _objects(file)]


def write(file: Path, new: Sequence[Entry]) -> None:
    """Put ``new`` into a tuning file, instead of its entries with the same key; the others stay."""
    kept = {entry.key: entry for entry in (read(file) if file.is_file() else ())} | {entry.key: entry for entry in new}
    lines = [
        json.dumps({**{name: getattr(entry, name) for name in _TEXTS}, "parameters": dict(entry.parameters)})
        for entry in sorted(kept.values(), key=lambda entry: entry.key)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n " + ",\n ".join(lines) + "\n]\n", encoding="utf-8")


def _objects(file: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each element of the list that is a file's content."""
    text = file.read_text(encoding="utf-8")
    decoder = json.JSONDecoder()

    def line(at: int) -> int:
        return text.count("\n", 0, at) + 1

    def skip(at: int) -> int:
        return at + len(text[at:]) - len(text[at:].lstrip())

    at = skip(0)
    try:
        if not isinstance(json.loads(text), list):
            raise KernelError(f"{file}:{line(at)}: a tuning file is a JSON list of entries")
    except json.JSONDecodeError as error:
        raise KernelError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    at = skip(at + 1)
    while text[at] != "]":
        value, end = decoder.raw_decode(text, at)
        yield line(at), value
        at = skip(end)
        at = skip(at + 1) if text[at] == "," else at


def _entry(where: str, fields: Any) -> Entry:
    known = {*_TEXTS, "parameters"}
    if not isinstance(fields, dict) or fields.keys() != known:
        got = ", ".join(sorted(fields)) if isinstance(fields, dict) else repr(fields)
        raise KernelError(f"{where}: an entry has the keys {', '.join(sorted(known))}, got {got}")
    for name in _TEXTS:
        if not isinstance(fields[name], str):
            raise KernelError(f"{where}: {name} must be a string, got {fields[name]!r}")
    for name, allowed in (
        ("op", list(registry.OPS)),
        ("dtype", list(registry.DTYPES.values())),
        ("by", list(BY)),
        ("shape", _all_classes()),
    ):
        if fields[name] not in allowed:
            shown = allowed if len(allowed) < 20 else [allowed[0], "...", allowed[-1]]
            raise KernelError(f"{where}: {name} must be one of {', '.join(map(repr, shown))}, got {fields[name]!r}")
    parameters = fields["parameters"]
    if not isinstance(parameters, dict) or not parameters or not all(type(n) is int for n in parameters.values()):
        raise KernelError(f"{where}: parameters must be whole numbers by name, got {parameters!r}")
    return Entry(**{name: fields[name] for name in _TEXTS}, parameters=parameters, where=where)


@functools.lru_cache(maxsize=1)
def _all_classes() -> list[str]:
    lengths, channels = (*LENGTHS, LENGTHS[-1] + 1), (*CHANNELS, CHANNELS[-1] + 1)
    return [shape_class({"q": q, "k": k, "e": e}) for q in lengths for k in lengths for e in channels]
