"""Runs Python code in a process of its own, from the root of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *arguments: str, **environment: str) -> str:
    """What ``python -c code`` prints; an exit status other than 0 is an AssertionError that shows stderr."""
    done = start(code, *arguments, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -c code arguments``, with stdout, stderr and the exit status."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
