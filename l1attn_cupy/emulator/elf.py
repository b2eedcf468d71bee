"""Reads the thread-local symbols of a shared object: they are a kernel's shared variables."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path
from typing import NamedTuple

_SYMTAB, _TLS = 2, 6
_LOCAL_NAME = re.compile(r"E\d+([A-Za-z_]\w*?)(?:_\d+)?$")  # _ZZ<function>E<length><name>


class SharedVariable(NamedTuple):
    """Where a shared variable lies in the kernel's thread-local image, in bytes."""

    offset: int
    size: int
    name: str
    is_guard: bool  # not a variable, but the flag that a compiler keeps to initialise one


@functools.lru_cache(maxsize=256)
def shared_variables(library: Path) -> tuple[SharedVariable, ...]:
    """The shared variables of a kernel, by offset. Arrays of dynamic shared memory have size 0."""
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count = struct.unpack_from("<HH", data, 0x3A)
    # (type, offset, size, link) of each section
    sections = [struct.unpack_from("<4xI16xQQI", data, table + i * entry) for i in range(count)]
    found = []
    for kind, offset, size, link in sections:
        if kind != _SYMTAB:
            continue
        names = sections[link][1]
        for name, info, section, value, length in struct.iter_unpack("<IBxHQQ", data[offset : offset + size]):
            if info & 15 == _TLS and section != 0:
                start = names + name
                found.append(_variable(value, length, data[start : data.index(0, start)].decode()))
    return tuple(sorted(v for v in found if not v.name.startswith("emu_")))


def _variable(offset: int, size: int, symbol: str) -> SharedVariable:
    local = _LOCAL_NAME.search(symbol)
    name = local.group(1) if local and symbol.startswith("_Z") else symbol
    return SharedVariable(offset, size, name, symbol.startswith("_ZGV"))
