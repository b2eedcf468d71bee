"""`lab new`: a copy of a variant in the user's folder, its header ready to edit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..cuda import registry
from ..cuda.registry import KernelError, Variant

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def own_folder() -> Path:
    """The folder that L1ATTN_KERNELS names, made if it is not there."""
    named = os.environ.get("L1ATTN_KERNELS")
    if not named:
        raise KernelError(
            "there is no folder for kernels of your own; say where: export L1ATTN_KERNELS=$PWD/my_kernels"
        )
    folder = Path(named)
    if folder.exists() and not folder.is_dir():
        raise KernelError(f"L1ATTN_KERNELS must name a folder, got {named!r}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_variant(name: str) -> Variant:
    """By the name of its file, ``scores_forward_gather``, or by its own, ``gather``, where one op has it."""
    short = Path(name).name.removesuffix(".cu")
    everything = registry.variants()
    found = {f"{v.op}_{v.name}": v for v in reversed(everything) if short in (v.name, f"{v.op}_{v.name}")}
    if not found:
        names = ", ".join(dict.fromkeys(f"{v.op}_{v.name}" for v in everything))
        raise KernelError(f"--from must be one of {names}, got {name}")
    if len(found) > 1:
        raise KernelError(f"--from {name} is a variant of several ops: say {' or '.join(sorted(found))}")
    return next(iter(found.values()))


def new(name: str, origin: str) -> Path:
    """Copy the variant ``origin`` to the user's folder under ``name``.

    Raises
    ------
    KernelError
        There is no such variant, or one with the new name; the folder is not set.
    """
    if not _NAME.fullmatch(name):
        raise KernelError(f"NAME must be lower-case letters, digits and _, such as my_tiles, got {name!r}")
    folder = own_folder()
    source = find_variant(origin)
    taken = next((v for v in registry.variants(source.op) if v.name == name), None)
    if taken:
        raise KernelError(f"NAME must be new: {taken.where} is the variant {name!r} of {source.op} already")
    file = folder / f"{source.op}_{name}.cu"
    if file.exists():
        raise KernelError(f"NAME must be new: {file} is there already")
    file.write_text(edited(source.path.read_text(encoding="utf-8"), source, file.name), encoding="utf-8")
    return file


def edited(text: str, source: Variant, name: str) -> str:
    """The text of a kernel file with a header for the file ``name``; code and line breaks of the rest stay."""
    header = text[: len(text) - len(re.sub(r"\A(//[^\n]*\n)+", "", text))]
    rest = text[len(header) :]
    what = source.op.replace("_", " ")
    lines = header.splitlines()
    if lines and lines[0].startswith(f"// {source.path.name}:"):
        what = lines[0].partition(": ")[2].partition(";")[0].rstrip(".")
        lines = lines[1:]
    kept = _without_delta(lines)
    first = next((i for i, line in enumerate(kept) if "@variant" in line), len(kept))
    delta = f"// Delta     like {source.path.name}, but (say here what is different)"
    made = [f"// {name}: {what}; (say here what it is good for).", *kept[:first], delta]
    made += [re.sub(r"\brank=\d+", "rank=0", line) for line in kept[first:]]
    return "\n".join(made) + "\n" + rest


def _without_delta(lines: list[str]) -> list[str]:
    """A header without its Delta part, which ends with the next part or an empty line."""
    kept, inside = [], False
    for line in lines:
        if re.match(r"//\s+Delta\b", line):
            inside = True
        elif re.match(r"//\s?\S", line) or line.strip() == "//" or "@variant" in line:
            inside = False
        if not inside:
            kept.append(line)
    return kept
