"""Which kernels there are: reading the ``@variant`` lines of the ``.cu`` files, and choosing one for a call.

Nothing but the files says anything about a variant. A user's folder, named by the environment variable L1ATTN_KERNELS,
comes before the packaged one: a file of the same name replaces the packaged file, a new name is one more variant. Files
are read again when they change, so the next call uses an edited one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

#: What each op needs from a @variant line to derive its grid (see `launch` and `launch_attention`).
OPS = {
    "scores_forward": ({"BLOCK_Q", "BLOCK_K", "THREADS"},),
    "scores_backward": ({"BLOCK_X", "BLOCK_E", "THREADS"}, {"BLOCK_Q", "BLOCK_K", "BLOCK_E", "THREADS", "ATOMIC"}),
    "scores_jvp": ({"BLOCK_Q", "BLOCK_K", "THREADS"},),
    "scores_quantized": ({"BLOCK_Q", "BLOCK_K", "THREADS"},),
    "attention_forward": ({"BLOCK_Q", "BLOCK_V", "THREADS"},),
    "attention_merge": ({"BLOCK_V", "THREADS"},),
    "attention_backward": ({"BLOCK_X", "BLOCK_E", "THREADS"},),
    "attention_mask_gradient": ({"BLOCK_Q", "BLOCK_K", "THREADS"},),
}
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
BYTES = {"i8": "int8", "u8": "uint8"}
DTYPES = {**FLOATS, **BYTES}
_LIMITS = ("min_q", "max_q", "min_k", "max_k", "min_e", "max_e", "min_v", "max_v")
_LINE = re.compile(r"^//\s*@variant\b(?P<rest>.*)$")


class KernelError(RuntimeError):
    """A kernel file that cannot be used: its header, its compilation, or what it needs and does not find."""


@dataclass(frozen=True)
class Variant:
    """One ``@variant`` line: a kernel with its parameters, and the dtypes and sizes it is for.

    Where the line lists values for a parameter (``BLOCK_Q=64,128``), ``choices`` has them all and ``parameters`` the
    first: that is what a call uses, unless a tuning file says otherwise (see `tuning`).
    """

    op: str
    name: str
    path: Path
    line: int
    dtypes: tuple[str, ...]
    parameters: Mapping[str, int] = field(hash=False)
    rank: int = 0
    limits: Mapping[str, int] = field(default_factory=dict, hash=False)
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    #: Whether differences are rounded to float16; a looser bound holds then.
    f16_differences: bool = False

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path}:{self.line}"

    @property
    def atomic(self) -> bool:
        """Whether several blocks add to one output, which must then be zero and of the accumulation dtype."""
        return self.parameters.get("ATOMIC", 0) == 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block that its launch adds, for what a kernel declares `extern __shared__`."""
        return self.parameters.get("SHARED", 0)

    def fits(self, dtype: str, sizes: Mapping[str, int]) -> bool:
        """Whether this variant is for ``dtype`` and for ``sizes``, which has the keys q, k, e and, for attention, v."""
        within = (
            (sizes[limit[-1]] >= bound) if limit.startswith("min") else (sizes[limit[-1]] <= bound)
            for limit, bound in self.limits.items()
        )
        return dtype in self.dtypes and all(within)

    def with_parameters(self, chosen: Mapping[str, int]) -> Variant:
        """The same with ``chosen`` instead of the first of each list, and nothing left to choose."""
        return replace(self, parameters={**self.parameters, **chosen}, choices={})

    def combinations(self) -> list[dict[str, int]]:
        """Every way to choose one value from each list, the defaults first; one empty dict if there are no lists."""
        return [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]


@functools.lru_cache(maxsize=1)
def packaged_folder() -> Path:
    """The folder of the kernels that come with the package, installed or in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed, source = package / "kernels_cu", package.parent / "kernels_cu"
    for folder in (installed, source):
        if (folder / "common.cuh").is_file():
            return folder
    raise KernelError(f"the kernels were not found, neither in {installed} nor in {source}; install l1attn_cupy again")


def folders() -> list[Path]:
    """The user's folder, if there is one, and the packaged one."""
    own = os.environ.get("L1ATTN_KERNELS")
    if not own:
        return [packaged_folder()]
    if not Path(own).is_dir():
        raise KernelError(f"L1ATTN_KERNELS must name a folder, got {own!r}")
    return [Path(own), packaged_folder()]


def dtypes_of(op: str) -> dict[str, str]:
    """The dtypes of query and key that an op is for, by their short names."""
    return BYTES if op == "scores_quantized" else DTYPES if op == "attention_forward" else FLOATS


def generation(op: str = "") -> int:
    """A number that changes when a file does that a call of ``op`` depends on; what is cached by it is never stale.

    These are its kernels, headers and tuning files, and which files there are at all. By default, all files; otherwise
    ``op`` may be the beginning of several.
    """
    own = os.environ.get("L1ATTN_KERNELS")
    try:
        stamps = tuple([_stamps(folder, op) for folder in _known_folders(own)])
        state = (op, own, os.environ.get("L1ATTN_EMULATOR_DEVICE"), _identity(_only.get()), stamps)
    except FileNotFoundError as error:  # a folder that was there, or a link to nowhere
        _known_folders.cache_clear()
        folders()
        raise KernelError(f"a kernel file cannot be read: {error}") from None
    return _generation_of(state)


@functools.lru_cache(maxsize=8)
def _known_folders(own: str | None) -> list[str]:
    return list(map(str, folders()))


def _stamps(folder: str, op: str) -> tuple:
    """When the folder and each file in it were last changed; a system call for each, this runs on every call."""
    changed = os.stat(folder).st_mtime_ns
    files, tuning = _files(folder, changed, op)
    own = changed, *[os.stat(path).st_mtime_ns for path in files]
    return (own, _stamps(tuning, op)) if tuning else own


@functools.lru_cache(maxsize=64)
def _files(folder: str, changed: int, op: str) -> tuple[list[str], str]:
    """The files in it that ``op`` depends on, and its folder of tuning files, if any; not the locks of editors."""
    found = [path for pattern in ("[!.]*.cu*", "[!.]*.json") for path in Path(folder).glob(pattern)]
    files = [str(path) for path in found if path.suffix != ".cu" or path.name.startswith(op)]
    tuning = Path(folder, "tuning")
    return sorted(files), str(tuning) if tuning.is_dir() else ""


_generations: dict[tuple, int] = {}


def _generation_of(state: tuple) -> int:
    return _generations.setdefault(state, len(_generations))


_only: ContextVar[Variant | None] = ContextVar("_only", default=None)


@contextlib.contextmanager
def only(variant: Variant) -> Iterator[None]:
    """Within it, calls of the variant's op get ``variant``, whatever files say: for parameters that are being tried."""
    token = _only.set(replace(variant, choices={}))
    try:
        yield
    finally:
        _only.reset(token)


def _identity(variant: Variant | None) -> tuple | None:
    return (variant.where, variant.name, *variant.parameters.items()) if variant else None


def variants(op: str | None = None) -> list[Variant]:
    """All variants, of ``op`` if given, in the order in which they are preferred."""
    if op is not None and op not in OPS:
        raise ValueError(f"op must be None or one of {', '.join(map(repr, OPS))}, got {op!r}")
    return [variant for variant in _variants(generation()) if op in (None, variant.op)]


@functools.lru_cache(maxsize=8)
def _variants(_generation: int) -> tuple[Variant, ...]:
    files: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!.]*.cu")):
            files.setdefault(path.name, path)
    found = [variant for path in files.values() for variant in read(path)]
    return tuple(sorted(found, key=lambda v: (v.op, -v.rank, v.name, v.line)))


def choose(op: str, dtype: str, sizes: Mapping[str, int], name: str | None) -> Variant:
    """The variant ``name``, or the one of highest rank that fits; sizes is as in `Variant.fits`."""
    forced = _only.get()
    candidates = [forced] if forced and forced.op == op else variants(op)
    if name is not None:
        candidates = [v for v in candidates if v.name == name]
        if not candidates:
            names = ", ".join(repr(n) for n in sorted({v.name for v in variants(op)}))
            raise ValueError(f"variant must be None or one of {names} for {op}, got {name!r}")
    for variant in candidates:
        if variant.fits(dtype, sizes):
            return variant
    takes = "; ".join(f"{v.name}: {', '.join(v.dtypes)} {dict(v.limits) or ''}".strip() for v in candidates)
    raise ValueError(
        f"variant must be one that takes {dtype} with L={sizes['q']}, S={sizes['k']}, E={sizes['e']} for {op}, "
        f"got {name!r} (there is {takes})"
    )


def read(path: Path) -> tuple[Variant, ...]:
    """The variants of one file, wherever it lies."""
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read(path: Path, modified: int) -> tuple[Variant, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise KernelError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None
    matches = [(number, match["rest"]) for number, line in enumerate(lines, 1) if (match := _LINE.match(line))]
    if not matches:
        raise KernelError(f"{path}:1: no '// @variant op=... dtypes=... BLOCK_...=... THREADS=...' line")
    found: list[Variant] = []
    for number, rest in matches:
        variant = _parse(path, number, rest)
        for other in found:
            both = [dtype for dtype in variant.dtypes if dtype in other.dtypes]
            if both and variant.limits == other.limits:
                raise KernelError(f"{variant.where}: line {other.line} is already for {both[0]} and these sizes")
        found.append(variant)
    return tuple(found)


def _parse(path: Path, number: int, text: str) -> Variant:
    where = f"{path}:{number}"
    words: dict[str, str] = {}
    for key, value in (_split(where, word) for word in text.split()):
        if key in words:
            raise KernelError(f"{where}: {key} is given twice")
        words[key] = value
    op, dtypes = words.pop("op", None), words.pop("dtypes", None)
    if op not in OPS:
        raise KernelError(f"{where}: op must be one of {', '.join(OPS)}, got {op}")
    if not path.stem.startswith(f"{op}_"):
        raise KernelError(f"{where}: the file of a variant of {op} must be named {op}_NAME.cu, got {path.name}")
    kinds = (dtypes or "").split(",")
    if len(set(kinds)) < len(kinds):
        raise KernelError(f"{where}: dtypes lists one twice, got {dtypes}")
    if not set(kinds) <= set(dtypes_of(op)):
        raise KernelError(f"{where}: dtypes must be a list from {','.join(dtypes_of(op))}, got {dtypes}")
    choices = {key: _numbers(where, key, value) for key, value in words.items() if key.isupper() and "," in value}
    numbers = {key: choices[key][0] if key in choices else _number(where, key, value) for key, value in words.items()}
    limits = {key: numbers.pop(key) for key in _LIMITS if key in numbers}
    if not op.startswith("attention") and (of_value := [key for key in limits if key.endswith("_v")]):
        raise KernelError(f"{where}: {of_value[0]} is for attention, {op} has no value")
    rank, rounds = numbers.pop("rank", 0), numbers.pop("f16_differences", 0)
    if rounds not in (0, 1):
        raise KernelError(f"{where}: f16_differences must be 0 or 1, got {rounds}")
    unknown = [key for key in numbers if not re.fullmatch(r"[A-Z][A-Z0-9_]*", key)]
    if unknown:
        raise KernelError(
            f"{where}: unknown key {unknown[0]}; known are op, dtypes, rank, {', '.join(_LIMITS)}, f16_differences and "
            "parameters in upper case"
        )
    if not any(required <= numbers.keys() for required in OPS[op]):
        raise KernelError(f"{where}: {op} needs {' or '.join(str(sorted(r)) for r in OPS[op])}, got {sorted(numbers)}")
    name = path.stem.removeprefix(f"{op}_")
    names = tuple(DTYPES[kind] for kind in kinds)
    return Variant(op, name, path, number, names, numbers, rank, limits, choices, rounds == 1)


def _split(where: str, word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise KernelError(f"{where}: @variant is followed by KEY=VALUE pairs, got {word!r}")
    return key, value


def _number(where: str, key: str, value: str) -> int:
    if not re.fullmatch(r"\d+", value):
        raise KernelError(f"{where}: {key} must be a whole number, got {value!r}")
    return int(value)


def _numbers(where: str, key: str, value: str) -> tuple[int, ...]:
    """A list of values to choose from, such as ``64,128``."""
    found = tuple(_number(where, key, part) for part in value.split(","))
    if len(set(found)) < len(found):
        raise KernelError(f"{where}: {key} lists a value twice, got {value}")
    return found


def source(variant: Variant) -> str:
    """What is compiled: common.cuh and the file, each counting its own lines."""
    places = folders()
    if variant.path.parent not in places:  # a file that is tried where it lies
        places.insert(0, variant.path.parent)
    common = next(folder / "common.cuh" for folder in places if (folder / "common.cuh").is_file())
    parts = ((common, common.name), (variant.path, str(variant.path)))
    return "".join(f'#line 1 "{name}"\n{path.read_text(encoding="utf-8")}\n' for path, name in parts)
