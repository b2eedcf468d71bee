"""What becomes of a kernel: registers and spills, and the instructions of its hottest loop. Needs no GPU.

    NVRTC (as CuPy calls it)  ->  PTX  ->  ptxas  ->  cubin  ->  nvdisasm  ->  instructions  ->  the hot loop

NVRTC can also go all the way to machine code, which is what runs under CuPy (`compile_native`); nvdisasm reads only
what its own toolkit assembled, hence the way through PTX. The tools are those of the pip packages nvidia-cuda-nvcc and
nvidia-cuda-nvdisasm, of one version, wherever they lie in these packages: never from PATH.

A *term* is one ``|q - k|`` added to one sum, or one ``sign(q - k)`` used for one gradient or for both. The compiler
leaves a mark on each, whatever it unrolls:

- a sum adds an absolute value, which is an operand modifier: ``FADD R1, R1, |R2|``. Packed, ``HADD2 R1,
  |R1|, |R2|``, it is two terms.
- four terms of bytes are one ``VABSDIFF4.U8.ACC``.
- a sign comes from a multiplication that saturates, `half_step` in ``common.cuh``: ``FFMA.SAT``.

`terms_per_step` says from a variant's header alone how many terms a thread must do for each channel (forward) or row of
the other array (backward) that it reads, so marks that are no multiple of it have been miscounted.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

from . import registry
from .compiler import OPTIONS
from .launch import DTYPE_CODES
from .registry import KernelError, Variant

#: Where each tool comes from.
_PACKAGES = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}


class ToolMissing(RuntimeError):
    """A tool is not installed; says which package has it."""


# ---- compiling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What a kernel takes from a multiprocessor.

    Parameters
    ----------
    registers : int
        Of each thread.
    spilled : int
        Bytes that a thread stores to and loads from local memory for want of registers, counted in the code.
    stack : int
        Bytes of local memory of each thread: what is spilled, and arrays that are indexed at run time.
    shared : int
        Bytes of shared memory of each block.
    """

    registers: int
    spilled: int
    stack: int
    shared: int


def missing() -> str:
    """Why machine code cannot be examined here, and what to install; "" if it can."""
    try:
        _nvrtc()
        _include_folder()
        for tool in _PACKAGES:
            _tool(tool)
    except ToolMissing as error:
        return str(error)
    return ""


def versions() -> tuple[str, ...]:
    """Of NVRTC and of each tool; raises `ToolMissing` where there is none."""
    nvrtc = ".".join(map(str, _nvrtc().getVersion()))
    for tool in _PACKAGES:
        _tool(tool)
    return (nvrtc, *(importlib.metadata.version(package) for package in _PACKAGES.values()))


def architectures() -> tuple[str, ...]:
    """The compute capabilities that the installed NVRTC compiles for, such as "75" and "90"."""
    return tuple(str(number) for number in _nvrtc().getSupportedArchs())


def compile_ptx(variant: Variant, dtype: str, arch: str = "90") -> str:
    """PTX of ``variant`` for arrays of ``dtype`` ("float32", ...) and the architecture ``arch`` ("90")."""
    ptx, _log = _compile(variant, dtype, f"compute_{arch}")
    return ptx if isinstance(ptx, str) else ptx.decode()


def compile_native(variant: Variant, dtype: str, arch: str = "90") -> Resources:
    """What NVRTC itself reports of the machine code that it makes: the code that CuPy would load."""
    _ptx, log = _compile(variant, dtype, f"sm_{arch}", "--ptxas-options=-v")
    return _resources(log, variant.shared)


def assemble(ptx: str, arch: str = "90", shared: int = 0) -> tuple[bytes, Resources]:
    """The cubin that ptxas makes of ``ptx``, and what it reports; ``shared`` as in `Variant.shared`."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        report = _run([_tool("ptxas"), "-v", f"-arch=sm_{arch}", source, "-o", cubin])
        return cubin.read_bytes(), _resources(report, shared)


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin with one kernel, in the order in which they lie."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return parse(_run([_tool("nvdisasm"), "-c", file]))


def _compile(variant: Variant, dtype: str, target: str, *more: str) -> tuple[str | bytes, str]:
    """NVRTC's PTX and log; the options are those of `compiler.kernel`."""
    nvrtc = _nvrtc()
    macros = {"DTYPE": DTYPE_CODES[dtype], **variant.parameters}
    defines = (f"-D{name}={value}" for name, value in macros.items())
    options = (*OPTIONS, f"-I{_include_folder()}", f"-arch={target}", *defines, *more)
    program = nvrtc.createProgram(registry.source(variant), variant.path.name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getPTX(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError:
        raise KernelError(
            f"{variant.path.name} does not compile with {' '.join(options)}:\n{nvrtc.getProgramLog(program)}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def _resources(report: str, shared: int) -> Resources:
    """From the lines that ``ptxas -v`` prints, and the bytes of shared memory that a launch adds."""

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(rf"(\d+) {pattern}", report))

    if "registers" not in report:
        raise RuntimeError(f"ptxas reported no registers:\n{report}")
    return Resources(number("registers"), number("bytes spill"), number("bytes stack"), number("bytes smem") + shared)


def _run(command: Sequence[str | Path]) -> str:
    """All that a tool prints; its failure is a RuntimeError."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with exit status {done.returncode}:\n{done.stdout}")
    return done.stdout


def _nvrtc() -> _Nvrtc:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise ToolMissing(
            f"NVRTC cannot be loaded ({error}): pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12"
        ) from None
    return nvrtc


@functools.lru_cache(maxsize=4)
def _include_folder() -> Path:
    """Where the cuda_fp16.h of NVRTC's own version is, for kernels that include it."""
    major = _nvrtc().getVersion()[0]
    return _file_of("nvidia-cuda-runtime-cu12" if major == 12 else "nvidia-cuda-runtime", "cuda_fp16.h").parent


def _tool(name: str) -> Path:
    return _file_of(_PACKAGES[name], name)


@functools.lru_cache(maxsize=8)
def _file_of(package: str, name: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise ToolMissing(f"{name} is not installed: pip install {package}")


class _Nvrtc(Protocol):
    """CuPy's module `cupy.cuda.nvrtc`, as far as it is used here."""

    NVRTCError: type[Exception]

    def getVersion(self) -> tuple[int, int]: ...
    def getSupportedArchs(self) -> tuple[int, ...]: ...
    def createProgram(self, source: str, name: str, headers: tuple, include_names: tuple) -> object: ...
    def compileProgram(self, program: object, options: tuple[str, ...]) -> None: ...
    def getProgramLog(self, program: object) -> str: ...
    def getPTX(self, program: object) -> str | bytes: ...
    def destroyProgram(self, program: object) -> None: ...


# ---- instructions ----------------------------------------------------------------------------------------------

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_FLOATING = re.compile(
    r"F(ADD|MUL|FMA|SETP|SET|SEL|MNMX|CHK)|H(ADD|MUL|FMA|SETP|SET|MNMX)2|D(ADD|MUL|FMA|SETP)|MUFU|HMMA"
)
_ABSOLUTE = re.compile(r"\|[^|]+\|")
_SUMS = ("FADD", "DADD", "HADD2", "HFMA2")  # what may add an absolute value; comparisons take one, too


#: Kinds of instructions, and how their opcodes begin; "arithmetic" is `Instruction.floating_point` but for
#: conversions (from float16 it is an addition of zero), and sums of bytes.
KINDS = {
    "arithmetic": r"(?!)",
    "shared memory": r"LDS|STS|LDSM|ATOMS",
    "global memory": r"LDG|STG|LD\b|ST\b|LDGSTS|RED|ATOMG?|LDL|STL|LDC|ULDC",
    "conversion": r"F2F|F2I|I2F|PRMT|HADD2\.F32",
    "integer": r"U?(IADD|IMAD|IMNMX|VIMNMX|IABS|LEA|LOP|PLOP|SHF|SHL|SHR|ISETP|SEL|FLO|POPC|BMSK|SGXT|VIADD)",
    "control": r"BRA|BSSY|BSYNC|BAR|EXIT|WARPSYNC|NOP|SHFL|VOTE|CALL|RET|DEPBAR|BREAK|BRX",
}


class Instruction(NamedTuple):
    """One machine instruction.

    Parameters
    ----------
    predicate : str
        What it depends on, such as "!P0"; "" if nothing.
    opcode, operands : str
        As nvdisasm writes them: "FADD.FTZ" and "R1, R2, |R3|".
    target : int or None
        Index of the instruction that it may jump to.
    """

    predicate: str
    opcode: str
    operands: str
    target: int | None

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def floating_point(self) -> bool:
        """Whether it is floating-point arithmetic, comparison or selection (16-bit and 64-bit included)."""
        return _FLOATING.match(self.opcode) is not None

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is, or "other"."""
        if self.base == "VABSDIFF4" or (self.floating_point and not re.match(KINDS["conversion"], self.opcode)):
            return "arithmetic"
        return next((kind for kind, pattern in KINDS.items() if re.match(pattern, self.opcode)), "other")

    @property
    def terms(self) -> int:
        """How many terms it completes (see the top of this file)."""
        if self.base in _SUMS and (absolute := _ABSOLUTE.findall(self.operands)):
            return 2 if self.base.endswith("2") else len(absolute)
        if self.base == "VABSDIFF4" and ".ACC" in self.opcode:
            return 4
        return int(self.floating_point and ".SAT" in self.opcode)

    @property
    def conditional(self) -> bool:
        """Whether a jump may also not be taken."""
        return bool(self.predicate) or ".DIV" in self.opcode or not self.operands.startswith("`")


def parse(text: str) -> list[Instruction]:
    """The instructions in what ``nvdisasm -c`` prints."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _INSTRUCTION.match(line):
            found.append((match[1] or "", match[2], match[3]))

    def target(operands: str) -> int | None:
        label = _TARGET.search(operands)
        return labels.get(label[1]) if label else None

    return [Instruction(*words, target(words[2])) for words in found]


# ---- the hot loop ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Loop:
    """The instructions of one turn of a loop, on the way through it that does the most terms, and the shortest such.

    Kernels have slower ways for numbers that are not finite and for rows that are nearly equal; those are other ways
    through the same loop.
    """

    instructions: tuple[Instruction, ...]

    def __repr__(self) -> str:
        opcodes = Counter(instruction.base for instruction in self.instructions)
        return f"<Loop of {self.terms} terms: {', '.join(f'{n} {opcode}' for opcode, n in opcodes.most_common())}>"

    @property
    def terms(self) -> int:
        """Terms in one turn."""
        return sum(instruction.terms for instruction in self.instructions)

    def count(self, *opcodes: str) -> int:
        """Instructions with one of these opcodes, modifiers aside."""
        return sum(instruction.base in opcodes for instruction in self.instructions)

    @property
    def floating_point(self) -> int:
        """Floating-point instructions in one turn."""
        return sum(instruction.floating_point for instruction in self.instructions)

    def kinds(self) -> dict[str, int]:
        """Instructions in one turn by kind; the kinds are those of `KINDS`, then "other"."""
        counts = Counter(instruction.kind for instruction in self.instructions)
        return {kind: counts[kind] for kind in (*KINDS, "other") if counts[kind]}

    @property
    def floating_point_per_term(self) -> float:
        return self.floating_point / self.terms

    @property
    def slots_per_term(self) -> float:
        """All instructions for each term: what the scheduler issues."""
        return len(self.instructions) / self.terms

    @property
    def shared_loads_per_64_terms(self) -> float:
        return 64 * self.count("LDS") / self.terms


def hot_loop(instructions: Sequence[Instruction]) -> Loop:
    """Of the innermost loops that have terms, the one with the most in one turn.

    Raises
    ------
    ValueError
        No loop has a term.
    """
    innermost = loops(instructions)
    if not innermost:
        raise ValueError("no loop of this kernel has a term that can be recognised (see the top of machine_code.py)")
    return max(innermost, key=lambda loop: (loop.terms, -len(loop.instructions)))


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that have terms: a kernel with sums and signs has one for each, and slower ways beside."""
    ends: dict[int, int] = {}  # of each loop's first instruction, the last jump back to it
    for at, instruction in enumerate(instructions):
        if instruction.base == "BRA" and instruction.target is not None and instruction.target < at:
            ends[instruction.target] = at
    found: dict[tuple[int, int], Loop] = {}
    for start, end in ends.items():
        loop = Loop(tuple(instructions[at] for at in _way_round(instructions, start, end)))
        if loop.terms:
            found[start, end] = loop
    return [
        loop
        for (start, end), loop in found.items()
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in found)
    ]


def _way_round(instructions: Sequence[Instruction], start: int, end: int) -> list[int]:
    """From ``start`` back to it, within ``start`` to ``end``, inner loops once: most terms first, then fewest steps."""
    leaving = {at: _successors(instructions, at) for at in range(start, end + 1)}
    best: dict[int, tuple[int, int, int | None]] = {}  # terms and minus steps from here on, and the next instruction
    for at in range(end, start - 1, -1):
        onward = [(*best[to][:2], to) for to in leaving[at] if to in best]  # in order of memory: only forward jumps
        if start in leaving[at]:
            onward.append((0, 0, -1))
        if onward:
            terms, steps, to = max(onward)
            best[at] = (terms + instructions[at].terms, steps - 1, to if to >= 0 else None)
    way: list[int] = []
    at_next: int | None = start if start in best else None
    while at_next is not None:
        way.append(at_next)
        at_next = best[at_next][2]
    return way


def _successors(instructions: Sequence[Instruction], at: int) -> set[int]:
    """What may come after instruction ``at``; calls return."""
    instruction = instructions[at]
    following = {at + 1}
    if instruction.base in ("EXIT", "RET", "KILL"):
        return following if instruction.predicate else set()
    if instruction.base == "BRA" and instruction.target is not None:
        return {instruction.target} | (following if instruction.conditional else set())
    return following


# ---- a variant -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What is known of a variant, for one dtype and one architecture, without running it."""

    resources: Resources
    loop: Loop


def profile(variant: Variant, dtype: str, arch: str = "90") -> Profile:
    """Compile, assemble, disassemble, and find the hot loop."""
    cubin, resources = assemble(compile_ptx(variant, dtype, arch), arch, variant.shared)
    return Profile(resources, hot_loop(disassemble(cubin)))


def terms_per_step(variant: Variant) -> Fraction:
    """Terms of one thread for each channel of q and k (forward), or each row of the other array (backward).

    From the header: the outputs of a block over its threads, or of a tile, if a block does one after the other; of
    attention the scores of a tile, in ``attention_backward`` by sum as well as by sign if their loops are the same. In
    ``scores_backward`` with ATOMIC=1 a term is for both gradients.
    """
    columns = "TILE_K" if "TILE_K" in variant.parameters else "BLOCK_K"
    sides = {
        "scores_forward": ("BLOCK_Q", columns),
        "scores_quantized": ("BLOCK_Q", columns),
        "scores_backward": ("BLOCK_X", "BLOCK_E"),
        "attention_forward": ("BLOCK_Q", columns),
        "attention_backward": ("BLOCK_X", "TILE_Y"),
    }[variant.op]
    if variant.atomic:
        sides = ("BLOCK_Q", "BLOCK_E")
    return Fraction(_product(variant, sides), variant.parameters["THREADS"])


def budget(variant: Variant) -> float:
    """The fewest floating-point instructions that a term takes; of bytes, instructions that sum four terms.

    A sum takes a subtraction and an addition of the absolute value; a sign for one gradient a subtraction, a
    multiplication that saturates, and one that adds; with ATOMIC=1 one more addition serves the second gradient. With
    ``f16_differences`` one instruction does it for two terms.
    """
    if variant.op not in BUDGETS:
        raise ValueError(f"op must be one of {', '.join(BUDGETS)}, got {variant.op!r}")
    if set(variant.dtypes) <= set(registry.BYTES.values()):
        return BYTES_BUDGET
    return 1 if variant.f16_differences else BUDGETS[variant.op] + variant.atomic


#: Of bytes, four terms to an instruction.
BYTES_BUDGET = 0.25

#: For each op the budget of a term for one gradient, or of a score, in float32; products of matrices are not in terms.
BUDGETS = {
    "scores_forward": 2,
    "scores_quantized": BYTES_BUDGET,
    "scores_backward": 3,
    "attention_forward": 2,
    "attention_backward": 3,
}


def _product(variant: Variant, keys: Iterable[str]) -> int:
    result = 1
    for key in keys:
        result *= variant.parameters[key]
    return result
