"""What the tests of the kernel lab share: its command line in this process, and kernels copied and damaged."""

from __future__ import annotations

import re
from pathlib import Path

from l1attn_cupy.cuda import registry
from l1attn_cupy.lab.__main__ import main

GATHER = registry.packaged_folder() / "scores_forward_gather.cu"


def lab(capsys, *arguments: object) -> tuple[int, str]:
    """Exit status, and what a command prints to either stream."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def damaged(folder: Path, name: str, *changes: tuple[str, str], file: Path = GATHER, dtypes: str = "f32") -> Path:
    """A copy of a kernel with pieces of its text replaced, for fewer dtypes, of rank 0."""
    text = re.sub(r"dtypes=\S+", f"dtypes={dtypes}", re.sub(r"rank=\d+", "rank=0", file.read_text()))
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    made = folder / name
    made.write_text(text, encoding="utf-8", errors="surrogateescape")
    return made


def line_of(file: Path, part: str) -> int:
    """Number of the first line with ``part``."""
    return next(n for n, line in enumerate(file.read_text(errors="replace").splitlines(), 1) if part in line)
