"""The host compiler: finding it, its options, and the cache of what it has built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .abi import DYNAMIC_SHARED_CAPACITY
from .errors import EmulatorCompileError
from .source import host_source, named_files

_HERE = Path(__file__).parent
_INCLUDE = _HERE / "include"
_RUNTIME = _HERE / "runtime"

_NO_CUDA_HEADERS = "L1ATTN-EMULATOR-NEEDS-CUDA-HEADERS"  # from include/cuda_fp16.h

_COMMON_FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -w -fvisibility=hidden -fno-exceptions -fno-rtti -fno-stack-protector "
    # As on the GPU, char is signed.
    "-fsigned-char "
    # A tail call would hide the line that it came from.
    "-fno-optimize-sibling-calls "
    # A thread with too much local memory must meet the guard page and not step over it.
    "-fstack-clash-protection "
    # CUDA code reinterprets float as float4 freely; nvcc does not hold that against it.
    "-fno-strict-aliasing -fno-math-errno -fno-trapping-math "
    # nvcc fuses a * b + c by default, and so does this (where the processor can, see _processor_flags).
    "-ffp-contract=fast "
    # A kernel that never ends must never end here either.
    "-fno-finite-loops"
).split()

# Shared variables of templates would otherwise be one and the same in all kernels of the process.
_GCC_FLAGS = ["-fno-gnu-unique"]

# A call to the engine at every access to memory (checks.hpp); nothing of the sanitizers' run-times is linked.
_CHECKED_FLAGS = (
    "-fsanitize=thread -fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero "
    "-fno-sanitize-recover=all -fno-tree-vectorize"
).split()

_GCC_CHECKED_FLAGS = (
    # Loops that become memset(), and loads that move out of an `if`, would be accesses that nobody wrote.
    "-fno-tree-loop-distribute-patterns -fno-tree-loop-im -fno-hoist-adjacent-loads"
).split()
_CLANG_CHECKED_FLAGS = ["-mllvm", "-tsan-instrument-func-entry-exit=0"]

# New in GCC 12: no calls at entry and exit of functions; and local variables that the kernel forgets to initialise
# hold a pattern, not what another thread has left there.
_GCC_12_FLAGS = ["-ftrivial-auto-var-init=pattern"]
_GCC_12_CHECKED_FLAGS = ["--param", "tsan-instrument-func-entry-exit=0"]
# Denormals are flushed: x - y > 0 is not x > y.
_CLANG_FLAGS = ["-ftrivial-auto-var-init=pattern", "-fdenormal-fp-math=preserve-sign"]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler and what is known about it.

    Parameters
    ----------
    command : list of str
        How to call it.
    version : str
        The first line it prints for ``--version``.
    major : int
        Its major version.
    """

    command: list[str]
    version: str
    major: int

    @property
    def is_clang(self) -> bool:
        """Whether it takes Clang's options, not GCC's."""
        return "clang" in self.version.lower()

    def flags(self, *, check: bool) -> list[str]:
        """Options for a kernel."""
        flags = [*_COMMON_FLAGS, *_processor_flags()]
        checked = [*_CHECKED_FLAGS]
        if self.is_clang:
            flags += _CLANG_FLAGS
            checked += _CLANG_CHECKED_FLAGS
        else:
            flags += _GCC_FLAGS + (_GCC_12_FLAGS if self.major >= 12 else [])
            checked += _GCC_CHECKED_FLAGS + (_GCC_12_CHECKED_FLAGS if self.major >= 12 else [])
        return flags + checked if check else flags


def find_compiler() -> Compiler:
    """The C++ compiler: environment variable CXX, else g++, clang++ or c++ from PATH."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise EmulatorCompileError(
            f"the emulator runs on Linux on x86-64 and aarch64, not on {sys.platform} {platform.machine()}; "
            "a container or WSL2 will do"
        )
    asked = os.environ.get("CXX", "").strip()
    candidates = [shlex.split(asked)] if asked else [["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return _describe(tuple(command))
    what = f"CXX={asked}, which does not exist" if asked else "none of g++, clang++ and c++ on PATH"
    raise EmulatorCompileError(
        f"the emulator compiles kernels with a C++ compiler and found {what}. Install one (Debian, Ubuntu: "
        "apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) or set CXX to it"
    )


@functools.lru_cache(maxsize=8)
def _describe(command: tuple[str, ...]) -> Compiler:
    def ask(option: str) -> str:
        done = subprocess.run([*command, option], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0]

    try:
        version, number = ask("--version"), ask("-dumpversion")
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise EmulatorCompileError(f"the C++ compiler {shlex.join(command)} does not run: {error}") from error
    compiler = Compiler(list(command), version, int(number.partition(".")[0]))
    oldest = 12 if compiler.is_clang else 10
    if compiler.major < oldest:
        raise EmulatorCompileError(f"the emulator needs g++ 10 or clang++ 12, or newer; {command[0]} is {version}")
    return compiler


@functools.lru_cache(maxsize=1)
def _processor_flags() -> tuple[str, ...]:
    """Fused multiply-add where this processor has it: without, fmaf() is a slow library call."""
    if platform.machine() != "x86_64":
        return ()
    with contextlib.suppress(OSError):
        known = set(Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split())
        if {"avx2", "fma", "f16c"} <= known:
            return ("-mavx2", "-mfma", "-mf16c")
    return ()


def cuda_include_dirs() -> list[Path]:
    """Folders with NVIDIA's cuda_fp16.h: from pip packages, CuPy, CUDA_PATH or /usr/local/cuda; best first."""
    found: list[Path] = []
    for package, pattern in (
        ("nvidia", "cuda_runtime/include"),
        ("nvidia", "cu[0-9]*/include"),
        ("cupy", "_core/include/cupy/_cuda/cuda-*"),
    ):
        for root in _package_folders(package):
            found += sorted(root.glob(pattern), reverse=True)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            found.append(Path(os.environ[variable]) / "include")
    found.append(Path("/usr/local/cuda/include"))
    return [folder for folder in found if (folder / "cuda_fp16.h").is_file()][:1]


def _package_folders(package: str) -> list[Path]:
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            return [Path(p) for p in spec.submodule_search_locations or ()]
    return []


def cache_dir(part: str = "emulator") -> Path:
    """Where compiled kernels are kept: L1ATTN_CACHE_DIR, else ~/.cache; a temporary folder if not writable."""
    asked = os.environ.get("L1ATTN_CACHE_DIR")
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        home = Path(asked) if asked else Path.home() / ".cache" / "l1attn_cupy"
        folder = home / part
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return _temporary_cache(part)


@functools.lru_cache(maxsize=4)
def _temporary_cache(part: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"l1attn-{part}-"))


@functools.lru_cache(maxsize=1)
def _engine_text() -> bytes:
    """Everything of the engine that ends up in a binary."""
    files = sorted(p for folder in (_RUNTIME, _INCLUDE) for p in folder.rglob("*") if p.is_file())
    return b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)


def _key(*parts: str) -> str:
    digest = hashlib.sha256(_engine_text())
    for part in parts:
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder to build in, beside `target`, so that moving the result there is atomic."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        yield Path(folder)


def _run(command: list[str], folder: Path) -> str:
    """Run the compiler; returns its log when it failed, else the empty string."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return "" if done.returncode == 0 else (done.stderr or done.stdout or f"exit status {done.returncode}")


def build_engine(compiler: Compiler) -> Path:
    """The engine's shared object, built at first use."""
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-shared"]
    target = cache_dir() / f"engine-{_key(shlex.join(compiler.command), compiler.version, *flags)}.so"
    if not target.exists():
        with _scratch(target) as folder:
            command = [*compiler.command, *flags, str(_RUNTIME / "engine.cpp"), "-o", "engine.so"]
            log = _run([*command, f"-Wl,-soname,{target.name}"], folder)
            if log:
                raise EmulatorCompileError(
                    f"the emulator's engine does not compile\n{shlex.join(command)}\n({compiler.version})\n{log}"
                )
            os.replace(folder / "engine.so", target)
    return target


def build_kernel(
    source: str, *, name: str, defines: Mapping[str, str | int], entry: str, check: bool, compiler: Compiler
) -> tuple[Path, Path]:
    """Compile a kernel, unless the cache has it.

    Returns
    -------
    engine, kernel : Path
        The two shared objects, to be loaded in this order.
    """
    engine = build_engine(compiler)
    text = host_source(source, entry=entry, name=name, capacity=DYNAMIC_SHARED_CAPACITY)
    macros = [f"-D{key}={value}" for key, value in defines.items()]
    cuda = cuda_include_dirs()
    flags = [*compiler.flags(check=check), *macros]
    options = [*flags, f"-I{_INCLUDE}", *(f"-isystem{folder}" for folder in cuda), "-include", "cuda_shim.hpp"]
    target = engine.parent / f"kernel-{_key(text, engine.name, *options)}.so"
    if not target.exists():
        with _scratch(target) as folder:
            for file, content in {**named_files(source), "kernel.cpp": text}.items():
                (folder / file).write_text(content)
            log = _run([*compiler.command, *options, "-c", "kernel.cpp", "-o", "kernel.o"], folder)
            if not log:
                link = [*compiler.command, "-shared", "kernel.o", "-o", "kernel.so", str(engine), "-Wl,-z,defs"]
                log = _run([*link, "-lm"], folder)
            if log:
                raise EmulatorCompileError(_compile_message(name, log, flags, compiler))
            os.replace(folder / "kernel.so", target)
    return engine, target


def _compile_message(name: str, log: str, flags: list[str], compiler: Compiler) -> str:
    if _NO_CUDA_HEADERS in log:
        header = log.split(_NO_CUDA_HEADERS, 1)[1].split()[0].strip('"')
        return (
            f"kernel '{name}' includes {header}, which is NVIDIA's and was not found. Install it: "
            "pip install nvidia-cuda-runtime-cu12 (or nvidia-cuda-runtime for CUDA 13), or set CUDA_PATH to a "
            "CUDA toolkit"
        )
    first = next((line for line in log.splitlines() if "error:" in line), log.splitlines()[0])
    options = shlex.join(flags)
    return f"kernel '{name}' does not compile: {first.strip()}\n{log}\noptions: {options}\ncompiler: {compiler.version}"
