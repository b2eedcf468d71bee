"""What the compiler makes of a variant, kept on disk: registers, spills, shared memory, instructions per term."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ..cuda import machine_code, occupancy, registry
from ..cuda.machine_code import Resources
from ..cuda.occupancy import Occupancy
from ..cuda.registry import Variant
from ..emulator.toolchain import cache_dir

ARCH = "90"  # what is looked at where no other architecture is asked for


@dataclass(frozen=True)
class Costs:
    """One variant for one dtype and architecture.

    Parameters
    ----------
    terms : int
        Terms in one turn of the hot loop; 0 where none can be told (see `machine_code`).
    kinds : dict
        Instructions in one turn of the hot loop, by kind.
    """

    resources: Resources
    threads: int
    arch: str
    terms: int
    kinds: dict[str, int]

    @property
    def occupancy(self) -> Occupancy:
        return occupancy.occupancy(self.resources, self.threads, self.arch)

    @property
    def slots_per_term(self) -> float | None:
        """All instructions of the hot loop for each term: what the scheduler issues."""
        return sum(self.kinds.values()) / self.terms if self.terms else None


def costs(variant: Variant, dtype: str, arch: str = ARCH) -> Costs:
    """Compile ``variant``, or look it up.

    Raises
    ------
    KernelError
        It does not compile.
    ToolMissing
        There is nothing to compile or disassemble it with.
    """
    file = cache_dir("lab") / f"costs-{_key(variant, dtype, arch)}.json"
    try:
        found = json.loads(file.read_text())
        return Costs(**{**found, "resources": Resources(**found["resources"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or half written
    made = _compute(variant, dtype, arch)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".new", delete=False) as new:
        json.dump(asdict(made), new)
    os.replace(new.name, file)
    return made


def _compute(variant: Variant, dtype: str, arch: str) -> Costs:
    cubin, resources = machine_code.assemble(machine_code.compile_ptx(variant, dtype, arch), arch, variant.shared)
    threads = variant.parameters["THREADS"]
    try:
        loop = machine_code.hot_loop(machine_code.disassemble(cubin))
    except ValueError:  # no term that can be recognised, as in float64 gradients
        return Costs(resources, threads, arch, 0, {})
    return Costs(resources, threads, arch, loop.terms, loop.kinds())


def _key(variant: Variant, dtype: str, arch: str) -> str:
    parts = (registry.source(variant), dtype, arch, *map(str, variant.parameters.items()), _tools())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=1)
def _tools() -> str:
    """What the result depends on beside the kernel: versions of the tools, and how their output is read."""
    here = Path(machine_code.__file__).read_text()
    return f"{machine_code.versions()} {hashlib.sha256(here.encode()).hexdigest()}"
