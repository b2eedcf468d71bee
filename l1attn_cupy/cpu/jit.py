"""Compilation of the CPU kernels: one decorator, and a disk cache that may be missing.

What is called in inner loops has ``forceinline``: an array is seven arguments of a call, most of them on the stack.
"""

from __future__ import annotations

import functools
import hashlib
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_warned = False


def kernel(**options: Any) -> Callable[[Callable], Any]:
    """`numba.njit` with this package's options, cached on disk where a cache folder can be written."""

    def decorate(function: Callable) -> Any:
        dispatcher = numba.njit(**_OPTIONS, **options)(_named_after(options, function))
        try:
            dispatcher._cache = _Cache(dispatcher.py_func)
        except RuntimeError as error:  # no writable place for it
            _warn_once(error)
        return dispatcher

    return decorate


def _named_after(options: dict[str, Any], function: Callable) -> Callable:
    """The function under a name that tells its options; Numba's cache goes by the name and ignores options."""
    if not options:
        return function
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = "_".join([function.__qualname__, *options])
    copy.__module__, copy.__doc__ = function.__module__, function.__doc__
    return copy


def compiled(dispatcher: Any, arguments: tuple) -> Callable[..., None]:
    """The machine code of a kernel for arguments of these types.

    Calling it leaves out what Numba does in every call, to find the types: 5 us where there are many named tuples.
    """
    return dispatcher.compile(tuple(map(numba.typeof, arguments)))


class _Cache(FunctionCache):
    """Numba's disk cache of one function, with two of its gaps closed.

    Numba watches the file of the function alone: a change to a function that it calls, in another file, would
    go unnoticed, also when the package is upgraded. And a disk that fills up is no reason for a call to fail.
    """

    def __init__(self, function: Callable):
        super().__init__(function)
        self._cache_file._source_stamp = source_stamp()

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(error)


@functools.lru_cache(maxsize=1)
def source_stamp() -> str:
    """Changes with any source file from which kernels are compiled."""
    here = Path(__file__).parent
    files = [here.parent / "functions.py", *sorted(here.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _warn_once(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "l1attn_cupy compiles its CPU kernels anew in every process, because numba cannot write its cache "
            f"({error}). Set NUMBA_CACHE_DIR to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )


def cache_folders() -> list[Path]:
    """Folders in which the compiled kernels of this package are cached; empty if none can be written."""
    from . import elements, scores

    caches = (kernel._cache for kernel in (elements.load_rows, scores.forward))
    return sorted({Path(cache.cache_path) for cache in caches if isinstance(cache, _Cache)})
