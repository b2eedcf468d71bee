"""How many threads a call uses, and Numba's threading layer, chosen so that no way of calling us kills the process.

Numba's layers differ in what they survive. ``tbb`` takes concurrent calls and calls after a fork; it needs the ``tbb``
package, whose library Numba finds only if it is loaded first. GNU OpenMP (``omp``) takes concurrent calls, but a
parallel call in a forked child ends that child. ``workqueue`` takes forks, but concurrent calls end the process. So:
tbb where it can be had; with omp, forked children run the serial kernels; with workqueue, calls take turns. With any
layer a child runs the serial kernels if another thread was in a parallel call when it was forked: it has inherited a
layer in the middle of its work, which may never finish.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba

from .. import arrays

#: Below so many terms a call runs on the caller's thread: starting the others costs more than they save.
SERIAL_TERMS = 1 << 18

_in_forked_child = False
_forked_during_call = False
_callers: set[int] = set()  # the threads that are in a parallel call
_turns = threading.Lock()


def _after_fork() -> None:
    global _in_forked_child, _forked_during_call, _turns
    _in_forked_child = True
    _forked_during_call |= bool(_callers)
    _callers.clear()
    _turns = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def choose_layer() -> None:
    """Prefer tbb, unless the user named a layer (NUMBA_THREADING_LAYER) or one is running already."""
    if numba.config.THREADING_LAYER == "default" and _running_layer() is None and _load_tbb():
        numba.config.THREADING_LAYER = "tbb"


def _load_tbb() -> bool:
    """Load the library of the ``tbb`` package where Numba's own loader would not look for it."""
    name = {"linux": "libtbb.so.12", "win32": "tbb12.dll"}.get(sys.platform)
    if name is None:
        return False
    for candidate in (Path(sys.prefix) / "lib" / name, Path(sys.prefix) / "Library" / "bin" / name, name):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL)
            return _has_tbb_pool()
    return False


def _has_tbb_pool() -> bool:
    try:
        importlib.import_module("numba.np.ufunc.tbbpool")
    except ImportError:
        return False
    return True


def _running_layer() -> str | None:
    """Numba's threading layer, or None before the first parallel call."""
    try:
        return numba.threading_layer()
    except ValueError:
        return None


def layer() -> str:
    """The threading layer in use, or the one that the first parallel call will use."""
    return _running_layer() or f"{numba.config.THREADING_LAYER} (not started)"


def count(array: Any, terms: int) -> int:
    """Threads for a call on ``array``: torch's setting for tensors, Numba's for NumPy; 1 if the work is small."""
    if terms < SERIAL_TERMS or _forked_during_call or (_in_forked_child and _running_layer() == "omp"):
        return 1
    wanted = sys.modules["torch"].get_num_threads() if arrays.is_torch(array) else numba.get_num_threads()
    return max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))


def launch(kernel: Callable[..., None], workers: int, *arguments: Any) -> None:
    """Call a compiled kernel on ``workers`` threads."""
    if workers == 1:
        kernel(*arguments)
        return
    with _turn(), _threads(workers):
        kernel(*arguments)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = numba.get_num_threads()
    _callers.add(threading.get_ident())
    try:
        numba.set_num_threads(n)
        yield
    finally:
        numba.set_num_threads(before)
        _callers.discard(threading.get_ident())


def _turn() -> contextlib.AbstractContextManager:
    """A lock where concurrent parallel calls are not safe; it stays unused with tbb and omp."""
    safe = _running_layer() in ("tbb", "omp") or numba.config.THREADING_LAYER == "tbb"
    return contextlib.nullcontext() if safe else _turns


choose_layer()
