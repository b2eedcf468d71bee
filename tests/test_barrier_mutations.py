"""Every barrier of every kernel is needed, and the emulator notices when one is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from l1attn_cupy.cuda import registry

ROOT = Path(__file__).resolve().parent.parent


def mutate(folder: Path, *options: str) -> tuple[int, str]:
    """Exit status and table of the script, for the kernels of a folder."""
    command = [sys.executable, str(ROOT / "scripts" / "mutate_barriers.py"), "--kernels", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
def test_mutations_are_all_noticed():
    """One by one, in all kernels: the emulator reports an error, or the numbers are wrong."""
    files = registry.packaged_folder().glob("*.cu")
    barriers = sum(len(re.findall(r"^[^/]*__syncthreads", file.read_text(), re.MULTILINE)) for file in files)
    status, table = mutate(registry.packaged_folder(), "--checks-only")
    print(table)
    assert status == 0, table
    assert f"All {barriers} mutants were noticed." in table


@pytest.mark.slow
def test_mutations_that_survive_are_told(tmp_path):
    """A barrier that nobody needs can go unnoticed; mutants of a kernel that is wrong already prove nothing."""
    text = (registry.packaged_folder() / "scores_forward_gather.cu").read_text()
    (tmp_path / "scores_forward_twice.cu").write_text(
        text.replace("__syncthreads();", "__syncthreads(); __syncthreads();")
    )
    (tmp_path / "scores_forward_wrong.cu").write_text(text.replace("sum += absolute(", "sum -= absolute("))
    status, table = mutate(tmp_path)
    assert status == 1
    rows = [" ".join(line.split()) for line in table.splitlines()]
    line = text.partition("__syncthreads()")[0].count("\n") + 1
    assert "scores_forward_twice.cu as it is right right" in rows, table
    assert rows.count(f"scores_forward_twice.cu:{line} __syncthreads() right right NOT OK") == 2, table
    assert "scores_forward_wrong.cu as it is wrong in 1 of 1 wrong in 3 of 3 NOT OK" in rows, table
    assert "3 NOT OK" in rows, table
