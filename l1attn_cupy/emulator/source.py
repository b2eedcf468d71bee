"""What a host compiler cannot be told by macros is rewritten in the text, line by line, so that line numbers stay."""

from __future__ import annotations

import re

_UNROLL = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+unroll\b.*$", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
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
    source = _UNROLL.sub("", source)  # here it would only make compilation ten times slower
    source = _SHARED_ALIGNAS.sub(r"__shared__\1__align__", source)  # alignas may not follow `static`
    source = _EXTERN_SHARED.sub(r"EMU_EXTERN_SHARED\1", source)
    arrays = sorted({m.group(1) for m in _DYNAMIC_SHARED.finditer(_COMMENT.sub(" ", source))})
    lines = [f'#line 1 "{name}"', source, '#line 1 "emulator"']
    if arrays:
        lines.append(_define_dynamic_shared(arrays, capacity))
    dynamic = "emu_dynamic_shared" if arrays else "nullptr"
    lines.append(f"EMU_MODULE({entry}, {dynamic})")
    return "\n".join(lines) + "\n"


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
