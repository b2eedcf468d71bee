"""Compilation of the CPU kernels: one decorator, and a disk cache that may be missing."""

from __future__ import annotations

import warnings
from pathlib import Path

import numba

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_warned = False


def kernel(**options):
    """`numba.njit` with this package's options, cached on disk where a cache folder can be written."""

    def decorate(function):
        try:
            return numba.njit(cache=True, **_OPTIONS, **options)(function)
        except RuntimeError as error:  # numba found no writable place for its cache
            _warn_once(error)
            return numba.njit(**_OPTIONS, **options)(function)

    return decorate


def _warn_once(error: RuntimeError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"l1attn_cupy compiles its CPU kernels anew in every process, because numba cannot write its cache "
            f"({error}). Set NUMBA_CACHE_DIR to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )


def cache_folders() -> list[Path]:
    """Folders in which the compiled kernels of this package are cached; empty if none can be written."""
    from . import elements, scores

    kernels = (elements.load_rows, scores.forward)
    caches = (getattr(dispatcher, "_cache", None) for dispatcher in kernels)
    return sorted({Path(cache.cache_path) for cache in caches if getattr(cache, "cache_path", None)})
