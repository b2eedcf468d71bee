"""Memory of large results: in huge pages, and used again.

Before the operating system lends a page it zeroes it, at a fault of its own: for a result of 32 MiB that takes as long
as a quarter of the sums. So memory of results that are no longer in use is kept for the next ones, as CuPy keeps that
of the GPU. It is marked as free (MADV_FREE): the system takes it back when it needs it, and lends it unzeroed until
then.

A result is an array over a `_Loan`, which gives the memory back when it dies: views and tensors over the same memory
keep it alive. Objects may die at any time, in any thread, in the middle of the code below, too. So nobody ever waits
for its lock: who does not get it does without the pool.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable

import numpy as np

#: From this size on; NumPy asks for huge pages from the same size on.
_LARGE = 1 << 22
_HUGE_PAGE = 1 << 21

#: What the pool keeps at most, in MiB, unless the environment variable says otherwise.
_VARIABLE, _MOST_MIB = "L1ATTN_POOL_MIB", 256

_offered = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")


class _Memory:
    """Pages of one mapping, from ``address`` on, where a huge page begins; they end with this object."""

    __slots__ = ("address", "mapping", "size")

    def __init__(self, size: int):
        self.size = size
        self.mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without huge pages
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        start = np.frombuffer(self.mapping, np.uint8).__array_interface__["data"][0]
        self.address = -(-start // _HUGE_PAGE) * _HUGE_PAGE


class _Pool:
    """Memory that is not in use, that of which was given last at the end."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything. In a forked child these are copies of its parent's pages, and its lock may be taken."""
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Drop all memory. A thread that is at work here keeps the list that it began with, and drops it with that."""
        self.kept: list[_Memory] = []

    def take(self, size: int) -> _Memory | None:
        """Memory of this size: what was given last, or new; None if the system has none."""
        kept = self.kept
        if self.lock.acquire(blocking=False):
            try:
                for i in reversed(range(len(kept))):
                    if kept[i].size == size:
                        return kept.pop(i)
            finally:
                self.lock.release()
        try:
            return _Memory(size)
        except OSError:
            return None

    def give(self, memory: _Memory) -> None:
        """Keep memory, and drop what was given first if that is too much."""
        try:
            most = limit()
        except ValueError:  # told of by the next call; here nobody would hear it
            return
        if most == 0:
            self.clear()
        if memory.size > most:
            return
        try:
            memory.mapping.madvise(mmap.MADV_FREE)
        except OSError:  # a system that cannot: it gets the pages back
            return
        dropped = []  # they end when the lock is free again
        kept = self.kept
        if self.lock.acquire(blocking=False):
            try:
                kept.append(memory)
                while sum(one.size for one in kept) > most:
                    dropped.append(kept.pop(0))
            finally:
                self.lock.release()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.reset)


class _Loan:
    """Lends memory to arrays, by NumPy's protocol for that."""

    __slots__ = ("__array_interface__", "memory")

    def __init__(self, memory: _Memory, nbytes: int):
        self.memory = memory
        self.__array_interface__ = {"data": (memory.address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self, exiting: Callable[[], bool] = sys.is_finalizing, give: Callable[..., None] = _pool.give) -> None:
        if not exiting():  # when modules are gone already
            give(self.memory)


def limit() -> int:
    """Bytes that the pool keeps at most; 0 where there is none."""
    named = os.environ.get(_VARIABLE, str(_MOST_MIB))
    try:
        mib = float(named)
    except ValueError:
        mib = math.nan
    if not 0 <= mib < math.inf:
        raise ValueError(f"{_VARIABLE} must be a number of MiB, at least 0, got {named!r}")
    return int(mib * 2**20) if _offered else 0


def kept() -> int:
    """Bytes in the pool."""
    return sum(memory.size for memory in list(_pool.kept))


def borrow(nbytes: int) -> np.ndarray | None:
    """``nbytes`` bytes for a large result; None for what the caller's own library is to make, as for all small ones."""
    if nbytes < _LARGE or limit() == 0:
        return None
    size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = _pool.take(size)
    return None if memory is None else np.asarray(_Loan(memory, nbytes))


def free_all_blocks() -> None:
    """Give the memory that is kept for the next large results on the CPU back to the operating system.

    Memory of arrays that are in use is not touched. Large results (4 MiB and above) are made in memory of earlier ones
    that are no longer in use, of which at most 256 MiB are kept, or what the environment variable ``L1ATTN_POOL_MIB``
    says; with 0 there is no pool. See ``cupy.get_default_memory_pool().free_all_blocks()`` for results on a GPU.
    """
    _pool.clear()
