"""How many blocks of a kernel a multiprocessor holds at once, and what stops it from holding more."""

from __future__ import annotations

from typing import NamedTuple

from .machine_code import Resources


class Multiprocessor(NamedTuple):
    """What one has for all its blocks; the same in all chips of a compute capability.

    Parameters
    ----------
    threads, blocks : int
        The most that it holds.
    shared : int
        Bytes of shared memory.
    reserved : int
        Bytes of shared memory that CUDA takes for itself in each block.
    """

    threads: int
    blocks: int
    shared: int
    reserved: int = 1024


#: By compute capability, from "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
MULTIPROCESSORS = {
    "75": Multiprocessor(1024, 16, 64 << 10, 0),
    "80": Multiprocessor(2048, 32, 164 << 10),
    "86": Multiprocessor(1536, 16, 100 << 10),
    "87": Multiprocessor(1536, 16, 164 << 10),
    "89": Multiprocessor(1536, 24, 100 << 10),
    "90": Multiprocessor(2048, 32, 228 << 10),
    "100": Multiprocessor(2048, 32, 228 << 10),
    "120": Multiprocessor(1536, 24, 100 << 10),
}

REGISTERS, REGISTER_STEP, SHARED_STEP = 64 << 10, 8, 128
MOST_THREADS = 1024


class Occupancy(NamedTuple):
    """Blocks and warps that are resident at once, the share of the warps there is room for, and what is scarce."""

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(resources: Resources, threads: int, arch: str) -> Occupancy:
    """Of a kernel with ``threads`` threads a block on the architecture ``arch`` ("90").

    Raises
    ------
    ValueError
        The architecture is not in `MULTIPROCESSORS`.
    """
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch must be one of {', '.join(MULTIPROCESSORS)}, got {arch!r}")
    chip = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    if threads > MOST_THREADS:
        return Occupancy(0, 0, 0.0, f"{threads} threads a block, at most {MOST_THREADS}")
    if resources.shared > (most := chip.shared - chip.reserved):
        return Occupancy(0, 0, 0.0, f"{resources.shared} bytes of shared memory a block, at most {most}")
    of_a_warp = 32 * _up(resources.registers, REGISTER_STEP)
    rooms = {
        "threads": chip.threads // (32 * warps),
        # Registers are handed out to warps, in four parts of the multiprocessor.
        "registers": 4 * (REGISTERS // 4 // max(1, of_a_warp)) // warps,
        "shared memory": chip.shared // max(1, _up(resources.shared + chip.reserved, SHARED_STEP)),
        "blocks": chip.blocks,
    }
    limit = min(rooms, key=lambda name: rooms[name])
    blocks = rooms[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps * 32 / chip.threads, limit)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
