"""What can be used here, and what `show_config` reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "tbb",
    "torch",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "ml_dtypes",
    "transformers",
    "jax",
)


class Backend(NamedTuple):
    """A backend, torch's name for the device of its arrays, and why it is missing ("" if it is not)."""

    name: str
    device: str
    missing: str


def backends() -> list[Backend]:
    """All backends, and which of them can be used here."""
    from .cuda import compiler

    return [
        Backend("cpu", "cpu", ""),
        Backend("cuda", "cuda", compiler.missing()),
        Backend("emulator", "cpu", _emulator_missing()),
    ]


def _emulator_missing() -> str:
    from .emulator import errors, toolchain

    try:
        toolchain.find_compiler()
    except errors.EmulatorCompileError as error:
        return str(error)
    return ""


def report() -> str:
    """Versions, backends, threads and cache folders, one fact a line."""
    lines = {f"l1attn_cupy {_version('l1attn_cupy') or 'from a source tree'}": _packages()}
    lines["backends"] = [f"{backend.name}: {backend.missing or 'available'}" for backend in backends()]
    lines["cpu"] = _cpu()
    lines["cuda and emulator"] = _cuda()
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in body) for title, body in lines.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[str]:
    versions = {name: _version(name) or "not installed" for name in PACKAGES}
    python = f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [python, *(f"{name} {version}" for name, version in versions.items())]


def _cpu() -> list[str]:
    import numba

    from .cpu import jit, threads, vector

    torch = sys.modules.get("torch")
    folders = jit.cache_folders()
    return [
        f"vector registers: {vector.register_bytes() * 8} bit",
        f"threads: {numba.get_num_threads()} for NumPy arrays"
        + (f", {torch.get_num_threads()} for torch tensors" if torch else " (torch is not imported)"),
        f"threading layer: {threads.layer()}",
        f"memory kept for large results: {_pool()}",
        *(f"kernel cache: {folder} ({_writable(folder, 'NUMBA_CACHE_DIR')})" for folder in folders),
    ]


def _pool() -> str:
    from .cpu import pages

    try:
        return f"{pages.kept() >> 20} MiB of at most {pages.limit() >> 20} (L1ATTN_POOL_MIB)"
    except ValueError as error:
        return str(error)


def _cuda() -> list[str]:
    """Where kernels come from, and where they are kept once compiled."""
    from .cuda import registry
    from .emulator import toolchain

    try:
        kernels = [f"kernels: {folder}" for folder in registry.folders()]
    except registry.KernelError as error:
        kernels = [f"kernels: {error}"]
    cupy = Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))
    built = toolchain.cache_dir()
    return [
        *kernels,
        f"cuda kernel cache: {cupy} ({_writable(cupy, 'CUPY_CACHE_DIR')})",
        f"emulator kernel cache: {built} ({_writable(built, 'L1ATTN_CACHE_DIR')})",
    ]


def _writable(folder: Path, variable: str) -> str:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    return "writable" if os.access(place, os.W_OK) else f"not writable: set {variable}"
