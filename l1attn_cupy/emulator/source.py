"""What a host compiler cannot be told by macros is rewritten in the text, line by line, so that line numbers stay."""

from __future__ import annotations

import re

_UNROLL = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+unroll\b.*$", re.MULTILINE)
_COMMENT = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])')|//[^\n]*|/\*.*?\*/""", re.DOTALL)
_LINE = re.compile(r'^#line 1 "([^"/]+)"\n', re.MULTILINE)
_SHARED_ALIGNAS = re.compile(r"\b__shared__(\s+)alignas\b")
_EXTERN_SHARED = re.compile(r"\bextern\b([^;{}]*?)\b__shared__\b")
_DYNAMIC_SHARED = re.compile(r"\bEMU_EXTERN_SHARED\b[^;{}]*?(\w+)\s*\[\s*\]\s*;")


def host_source(source: str, *, entry: str, name: str, capacity: int) -> str:
    """Turn CUDA C++ into a translation unit for the host.

    Parameters
    ----------
    source : str
        The kernel as written for CUDA.
    entry : str
        The kernel's function.
    name : str
        What to call the text ahead of its first ``#line`` in messages.
    capacity : int
        Bytes of dynamic shared memory to make room for.
    """
    source = _COMMENT.sub(_blank, source)
    source = _UNROLL.sub("", source)  # here it would only make compilation ten times slower
    source = _SHARED_ALIGNAS.sub(r"__shared__\1__align__", source)  # alignas may not follow `static`
    source = _EXTERN_SHARED.sub(r"EMU_EXTERN_SHARED\1", source)
    arrays = sorted({m.group(1) for m in _DYNAMIC_SHARED.finditer(source)})
    lines = [f'#line 1 "{name}"', source, '#line 1 "emulator"']
    if arrays:
        lines.append(_define_dynamic_shared(arrays, capacity))
    dynamic = "emu_dynamic_shared" if arrays else "nullptr"
    lines.append(f"EMU_MODULE({entry}, {dynamic})")
    return "\n".join(lines) + "\n"


def named_files(source: str) -> dict[str, str]:
    """The text that follows each ``#line 1 "file"``: beside the compiler's input, for it to quote from."""
    parts = _LINE.split(source)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _blank(match: re.Match[str]) -> str:
    """A comment as nothing but its line breaks, a string as it is: what follows must not find words in comments."""
    return match.group(1) or "\n" * match.group().count("\n") or " "


def _define_dynamic_shared(arrays: list[str], capacity: int) -> str:
    """Define the arrays that the kernel only declares: all begin at one address, as in CUDA.

    Their types are the kernel's affair, hence assembly. The second label of each is its name inside an
    anonymous namespace.
    """
    labels = [label for a in arrays for label in (a, f"_ZN12_GLOBAL__N_1{len(a)}{a}E")]
    text = ['.pushsection .tbss,"awT",@nobits', ".balign 128", "emu_dynamic_shared_begin:"]
    for label in labels:
        text += [f".type {label}, @object", f"{label}:"]
    text += [f".globl {a}\\n.hidden {a}" for a in arrays]
    text += [".globl emu_dynamic_shared_begin", ".hidden emu_dynamic_shared_begin"]
    text += [f".zero {capacity}", ".popsection"]
    joined = "\\n".join(text).replace('"awT"', '\\"awT\\"')
    return (
        f'asm("{joined}");\n'
        'extern "C" { __attribute__((visibility("hidden"))) extern __thread char emu_dynamic_shared_begin[]; }\n'
        "static void* emu_dynamic_shared() { return emu_dynamic_shared_begin; }"
    )
