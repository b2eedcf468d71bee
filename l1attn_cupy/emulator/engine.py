"""Compile CUDA kernels with the host compiler and run them on the CPU, one fiber per CUDA thread.

A block's threads run one at a time, from barrier to barrier, in an order that a seed shuffles. A checked kernel
(the default) is compiled with a call to the engine at every memory access, which finds accesses outside the
memory handed to the kernel, misaligned ones, reads of uninitialised shared memory, and races: two threads that
meet in a byte with no barrier between. An unchecked one (``check=False``, or ``L1ATTN_EMULATOR_CHECK=0``) is
faster; there a missing barrier shows as wrong numbers.

Numbers are as on the GPU but for this: denormals are flushed in float64 too; which products are fused with an
addition is the host compiler's choice (and none is, on x86-64 before AVX2); approximate functions (``__expf``,
``__fdividef``, ...) are computed in full; float16 and bfloat16 are rounded after each operation from float32.

Environment: ``CXX`` (compiler), ``L1ATTN_CACHE_DIR``, ``L1ATTN_EMULATOR_CHECK`` (0 or 1),
``L1ATTN_EMULATOR_WORKERS`` (OS threads that run blocks; default: one per core).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .abi import (
    DYNAMIC_SHARED_CAPACITY,
    STATIC_SHARED_CAPACITY,
    ErrorKind,
    ErrorRecord,
    LaunchRecord,
    ModuleRecord,
    RegionRecord,
    StatsRecord,
    load_engine,
)
from .elf import shared_variables
from .errors import EmulatorCompileError, EmulatorError
from .report import describe
from .toolchain import build_kernel, find_compiler

__all__ = [
    "EmulatedKernel",
    "EmulatorCompileError",
    "EmulatorError",
    "LaunchStats",
    "Region",
    "compile_kernel",
    "kernels_executed",
]

_MAX_THREADS = 1024
_MAX_WORKERS = 16  # each has a stack and a guard page per thread of a block; the kernel limits such mappings
_POLL_MS = 100
_RETRY_MS = 2


@dataclass(frozen=True)
class Region:
    """Global memory that a kernel may touch.

    Parameters
    ----------
    address : int
        Of the first byte.
    nbytes : int
        Length.
    writable : bool
        Whether the kernel may write to it.
    name : str
        What error messages call it.
    """

    address: int
    nbytes: int
    writable: bool
    name: str


@dataclass(frozen=True)
class LaunchStats:
    """What a launch did.

    Parameters
    ----------
    blocks, threads : int
        Executed, in all.
    barriers : int
        Times that a whole block met at a barrier.
    loads, stores : int
        Of shared and global memory, in instructions; 0 in an unchecked kernel, which does not count them.
    seconds : float
        Wall-clock time.
    """

    blocks: int
    threads: int
    barriers: int
    loads: int
    stores: int
    seconds: float


_count_lock = threading.Lock()
_executed = 0


def kernels_executed() -> int:
    """How many launches have ended without an error in this process."""
    return _executed


def compile_kernel(
    source: str,
    *,
    name: str,
    defines: Mapping[str, str | int],
    entry: str,
    check: bool | None = None,
) -> EmulatedKernel:
    """Compile CUDA C++ for the CPU; what was compiled before comes from a cache on disk.

    Parameters
    ----------
    source : str
        CUDA C++17. ``#line`` directives in it decide which file and line messages name.
    name : str
        What messages call the kernel.
    defines : mapping
        Macros, as with ``-D``.
    entry : str
        The kernel: ``extern "C" __global__ void entry(const SomeStruct args)``.
    check : bool, optional
        Whether to check every memory access. Default: environment variable ``L1ATTN_EMULATOR_CHECK``, else True.

    Returns
    -------
    EmulatedKernel

    Raises
    ------
    EmulatorCompileError
        With file, line, the compiler's log and the options; or with what to install.
    """
    if check is None:
        check = os.environ.get("L1ATTN_EMULATOR_CHECK", "1") != "0"
    engine, library = build_kernel(
        source, name=name, defines=defines, entry=entry, check=check, compiler=find_compiler()
    )
    return EmulatedKernel(name, engine, library, check=check)


class EmulatedKernel:
    """A compiled kernel. Made by :func:`compile_kernel`.

    Parameters
    ----------
    name : str
        What messages call it.
    engine, library : Path
        The shared objects of the engine and of the kernel.
    check : bool
        Whether the kernel was compiled with checks.
    """

    def __init__(self, name: str, engine: Path, library: Path, *, check: bool) -> None:
        self.name = name
        self.check = check
        self.library = library
        self._engine = load_engine(engine)
        self._library = ctypes.CDLL(str(library))
        self._module = ModuleRecord.in_dll(self._library, "emu_module")
        guards = [v.offset for v in shared_variables(library) if v.is_guard]
        self._guards = (ctypes.c_uint * len(guards))(*guards)
        self._static_shared = sum(v.size for v in shared_variables(library) if not v.is_guard)
        if self._static_shared > STATIC_SHARED_CAPACITY:
            raise EmulatorCompileError(
                f"kernel '{name}' has {self._static_shared} bytes of static shared memory, CUDA allows "
                f"{STATIC_SHARED_CAPACITY}: declare it `extern __shared__`"
            )

    def launch(
        self,
        grid: int,
        block: int,
        args: bytes,
        *,
        memory: Sequence[Region],
        shared_bytes: int = 0,
        seed: int = 0,
        time_limit: float | None = None,
        workers: int | None = None,
    ) -> LaunchStats:
        """Run the kernel to its end.

        Parameters
        ----------
        grid, block : int
            Blocks, and threads a block, both along x.
        args : bytes
            The kernel's one argument, a struct, as CUDA would receive it.
        memory : sequence of Region
            All the global memory that it may touch.
        shared_bytes : int
            Of dynamic shared memory.
        seed : int
            Decides in which order threads run between two barriers.
        time_limit : float, optional
            Seconds after which the launch is stopped with an error.
        workers : int, optional
            OS threads. With one, floating-point atomics from several blocks always come in the same order.

        Returns
        -------
        LaunchStats

        Raises
        ------
        EmulatorError
            For whatever the kernel does wrong. Its outputs are then undefined; the process goes on.
        """
        self._check_launch(grid, block, args, shared_bytes)
        if workers is None:
            workers = int(os.environ.get("L1ATTN_EMULATOR_WORKERS") or os.cpu_count() or 1)
        record = LaunchRecord()
        record.module = ctypes.pointer(self._module)
        record.args = ctypes.cast(ctypes.c_char_p(args), ctypes.c_void_p)
        record.regions = (RegionRecord * len(memory))(*(RegionRecord(r.address, r.nbytes, r.writable) for r in memory))
        record.region_count = len(memory)
        record.guards = self._guards
        record.guard_count = len(self._guards)
        record.grid, record.block, record.shared_bytes = grid, block, shared_bytes
        record.workers = max(1, min(workers, grid, _MAX_WORKERS))
        record.checked = self.check
        record.seed = seed & (2**64 - 1)

        start = time.perf_counter()
        stats, error, interrupted = self._run(record, time_limit)
        seconds = time.perf_counter() - start
        if interrupted:
            raise KeyboardInterrupt
        if error.kind != ErrorKind.OK:
            message = describe(error, name=self.name, library=self.library, regions=memory, limit=time_limit)
            raise EmulatorError(message)
        global _executed
        with _count_lock:
            _executed += 1
        return LaunchStats(grid, grid * block, stats.barriers, stats.loads, stats.stores, seconds)

    def _check_launch(self, grid: int, block: int, args: bytes, shared_bytes: int) -> None:
        if grid < 1 or grid > 2**31 - 1:
            raise EmulatorError(f"kernel '{self.name}': grid must be from 1 to 2147483647, got {grid}")
        if not 1 <= block <= _MAX_THREADS:
            raise EmulatorError(f"kernel '{self.name}': block must be from 1 to {_MAX_THREADS}, got {block}")
        if len(args) != self._module.args_bytes:
            raise EmulatorError(
                f"kernel '{self.name}': its argument struct has {self._module.args_bytes} bytes, got {len(args)}"
            )
        most = DYNAMIC_SHARED_CAPACITY - self._static_shared
        if not 0 <= shared_bytes <= most:
            raise EmulatorError(f"kernel '{self.name}': shared_bytes must be from 0 to {most}, got {shared_bytes}")

    def _run(self, record: LaunchRecord, time_limit: float | None) -> tuple[StatsRecord, ErrorRecord, bool]:
        """Start, wait (in short turns, so that Ctrl-C works), stop when time is up, and collect."""
        engine = self._engine
        deadline = None if time_limit is None else time.monotonic() + time_limit
        handle = engine.emu_start(ctypes.byref(record))
        if not handle:
            raise EmulatorError(f"kernel '{self.name}': not enough memory, or threads, to start it")
        interrupted = False
        stats, error = StatsRecord(), ErrorRecord()
        try:
            while not engine.emu_wait(handle, self._turn(deadline)):
                if deadline is not None and time.monotonic() >= deadline:
                    engine.emu_cancel(handle)
        except KeyboardInterrupt:
            interrupted = True
            while not engine.emu_wait(handle, _RETRY_MS):
                engine.emu_cancel(handle)
        engine.emu_finish(handle, ctypes.byref(stats), ctypes.byref(error))
        return stats, error, interrupted

    @staticmethod
    def _turn(deadline: float | None) -> int:
        """Milliseconds to wait before looking again."""
        if deadline is None:
            return _POLL_MS
        left = int(1000 * (deadline - time.monotonic())) + 1
        return max(_RETRY_MS, min(_POLL_MS, left))
