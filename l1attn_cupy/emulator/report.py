"""From the engine's record of an error to a sentence: which kernel, line, thread, block and address."""

from __future__ import annotations

import bisect
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .abi import ErrorKind, ErrorRecord
from .elf import shared_variables

if TYPE_CHECKING:
    from .engine import Region

_NOBODY = 0xFFFFFFFF
_NEAR = 1 << 20  # an address further than this from every region belongs to none


def describe(error: ErrorRecord, *, name: str, library: Path, regions: Sequence[Region], limit: float | None) -> str:
    """The message for `error`, raised by kernel `name` that was loaded from `library`."""
    kind = ErrorKind(error.kind)
    text = error.text.decode(errors="replace")
    verb = "write" if error.is_write else "read"
    size = f"{error.size} byte{'' if error.size == 1 else 's'}"
    place = _place(error, library, regions)
    what = {
        ErrorKind.OUT_OF_BOUNDS: f"out-of-bounds {verb} of {size}: {place}",
        ErrorKind.READ_ONLY: f"write of {size} to read-only memory: {place}",
        ErrorKind.MISALIGNED: f"misaligned {verb} of {size}: {place}",
        ErrorKind.UNINITIALISED: f"read of uninitialised shared memory: {place}",
        ErrorKind.RACE: _race(error, verb, place, library),
        ErrorKind.DIVERGENT: f"divergent barrier, no thread of the block can go on: {text}",
        ErrorKind.STOPPED: "interrupted" if limit is None else f"still running after the time limit of {limit:g} s",
        ErrorKind.UNDEFINED: text,
        ErrorKind.FAULT: text if not error.address else f"{text} (0x{error.address:x})",
    }[kind]
    where = f"\n  at {_who(error.thread, error.block)}"
    line = _line(library, error.pc) if error.pc else ""
    if not line and kind is ErrorKind.MISALIGNED and text:
        line = text.rpartition(":")[0]
    if line:
        where += f", {line}"
    return f"kernel '{name}': {what}{where}"


def _who(thread: int, block: int) -> str:
    return f"block {block}" if thread == _NOBODY else f"thread {thread} of block {block}"


def _race(error: ErrorRecord, verb: str, place: str, library: Path) -> str:
    other = "wrote" if error.other_is_write else "read"
    line = _line(library, error.other_pc) if error.other_pc else ""
    same = error.other_block == error.block
    missing = "no barrier is between" if same else "nothing orders blocks"
    return (
        f"race: {verb} of {place}, which {_who(error.other_thread, error.other_block)} {other}"
        f"{' at ' + line if line else ''}; {missing}"
    )


def _place(error: ErrorRecord, library: Path, regions: Sequence[Region]) -> str:
    """The address, in terms that the kernel's author knows."""
    address = int(error.address)
    if error.is_shared:
        return _shared_place(address, library)

    def distance(region: Region) -> int:
        return max(region.address - address, address - (region.address + region.nbytes - 1), 0)

    nearest = min(regions, key=distance, default=None)
    if nearest is None or distance(nearest) > _NEAR:
        return f"address 0x{address:x}, in no memory that was handed to the kernel"
    return f"{nearest.name}[...], byte offset {address - nearest.address} of {nearest.nbytes}"


def _shared_place(offset: int, library: Path) -> str:
    variables = [v for v in shared_variables(library) if not v.is_guard]
    i = bisect.bisect_right([v.offset for v in variables], offset) - 1
    if i < 0:
        return f"shared memory, byte offset {offset}"
    size = f" of {variables[i].size}" if variables[i].size else ""  # dynamic arrays have no size of their own
    return f"shared {variables[i].name}[...], byte offset {offset - variables[i].offset}{size}"


def _line(library: Path, pc: int) -> str:
    """``file.cu:12`` for an address in the kernel: the innermost line that is not the emulator's or NVIDIA's."""
    addr2line = shutil.which("addr2line")
    if addr2line is None or not pc:
        return ""
    command = [addr2line, "-i", "-e", str(library), hex(pc - 1)]  # -1: pc is where the call returns to
    frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [frame.split(" (discriminator")[0] for frame in frames if "??" not in frame and not frame.endswith(":?")]
    own = [line for line in lines if not line.rpartition(":")[0].endswith((".h", ".hpp"))]
    return Path((own or lines or [""])[0]).name
