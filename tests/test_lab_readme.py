"""The READMEs on the kernel lab, followed word by word: their commands, their edits, their Python, what they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from child import ROOT

from l1attn_cupy.cuda import machine_code, tuning

needs_tools = pytest.mark.skipif(bool(machine_code.missing()), reason=machine_code.missing() or "-")
pytestmark = [needs_tools, pytest.mark.slow]


class Block(NamedTuple):
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(path: Path, title: str) -> list[Block]:
    """Those of one section."""
    (section,) = re.findall(
        rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", _without_fences(path), re.MULTILINE | re.DOTALL
    )
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```", section.replace("\x00", "#"), re.M | re.S)]


def _without_fences(path: Path) -> str:
    """The text with every # inside a fence replaced, so that only headings begin with one."""
    return re.sub(r"^```\w+\n.*?^```", lambda m: m[0].replace("#", "\x00"), path.read_text(), flags=re.M | re.S)


def edit(folder: Path, diff: str) -> None:
    """Do what a reader does: find the lines without + in the file, and make them those without -."""
    name, *lines = diff.splitlines()
    file = folder / name.removeprefix("--- ")
    old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    text = file.read_text()
    assert text.count(old) == 1, old
    file.write_text(text.replace(old, new))


class Reader:
    """Somebody in an empty folder, with a shell that remembers what was exported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exported = ""

    def run(self, command: str) -> tuple[int, str]:
        """Exit status and output of a shell command."""
        self.exported += "".join(re.findall(r"^export .*\n", command + "\n", re.MULTILINE))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
        environment.pop("L1ATTN_KERNELS", None)
        done = subprocess.run(
            ["bash", "-euc", self.exported + command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def follow(self, block: Block) -> str:
        """What it prints; it must not fail."""
        if block.language == "diff":
            edit(self.folder, block.text)
            return ""
        command = block.text if block.language == "sh" else f"python - <<'END'\n{block.text}END"
        status, text = self.run(command)
        assert status == 0, text
        return text


def test_kernels_readme_adds_a_variant_with_one_file(tmp_path):
    """Created, tried, tuned and used from NumPy and torch; what is there then is one file, beside what tuning wrote."""
    reader = Reader(tmp_path)
    found = blocks(ROOT / "kernels_cu" / "README.md", "A variant in ten minutes")
    assert [block.language for block in found] == ["sh", "diff", "diff", "diff", "sh", "sh", "python"]
    printed = [reader.follow(block) for block in found]
    tried, tuned = printed[4:6]
    assert "All right" in tried
    assert [line.split()[-2] for line in tried.splitlines() if re.match(" *7 f32 ", line)] == ["5.50"]
    assert next(line.split()[-2] for line in tried.splitlines() if "before" in line) == "6.81"
    assert re.search(r"^1 +KEYS=\d .*best", tuned, re.MULTILINE)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["my_kernels/scores_forward_keys.cu", "my_kernels/tuning/sm-90.json"]
    assert tuning.read(tmp_path / files[1])[0].variant == "keys"


def test_readme_transcript_is_what_happens(tmp_path, have_gpu):
    """New, edit, try (wrong), fix, try (right): the same output to the letter, but for figures and the folder."""
    if have_gpu:
        pytest.skip("the transcript was made without a GPU")
    reader = Reader(tmp_path)
    found = blocks(ROOT / "README.md", "Trying a kernel")
    languages = [block.language for block in found if block.language in ("console", "diff")]
    assert languages == ["console", "diff", "console", "diff", "console"]
    for block in found:
        if block.language == "diff":
            edit(tmp_path, block.text)
        if block.language == "console":
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
                _, text = reader.run(command)
                assert _figures_aside(text.replace(f"{tmp_path}/", "")) == _figures_aside(shown)


def _figures_aside(text: str) -> list[str]:
    """Words with every number replaced, and what limits occupancy: these are the compilers' and the processor's."""
    numbers = re.sub(r"\d+(\.\d+)?", "N", text)
    return re.sub(r"\b(regs|smem|threads|blocks) +(?=N)", "LIMIT ", numbers).split()
