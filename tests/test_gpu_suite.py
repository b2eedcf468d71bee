"""The scripts that run everything on a GPU, as far as they go without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child import ROOT, start

TESTS_XML = """<testsuites><testsuite>
<testcase name="good"/><testcase name="also good"/>
<testcase name="bad"><failure message="no"/></testcase>
<testcase name="left out"><skipped message="no second GPU"/></testcase>
</testsuite></testsuites>"""
CHECK_LOG = "cuda inverse float32 random 1e-7 1e-6 1e-7 1e-6   ok\ncuda negative float32 tied NOT OK: KernelError: x\n"


def report(folder: Path, *parts: str) -> tuple[int, dict]:
    """Exit status of ``scripts/gpu_report.py``, and what it wrote."""
    code = (
        "import runpy, sys; sys.argv[0] = 'gpu_report.py'; runpy.run_path('scripts/gpu_report.py', run_name='__main__')"
    )
    done = start(code, str(folder), *parts, CUDA_VISIBLE_DEVICES="")
    assert not done.stderr, done.stderr
    return done.returncode, json.loads((folder / "no-gpu.json").read_text())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tests.xml").write_text(TESTS_XML)
    (tmp_path / "check.log").write_text(CHECK_LOG)
    (tmp_path / "bench.json").write_text('{"rows": [1, 2]}')
    return tmp_path


def test_gpu_report_collects_all_parts(folder):
    status, found = report(folder, "tests:0:9:270", "check:0:3:60", "bench:0:100:180")
    assert status == 0
    assert found["parts"]["bench"] == {"status": 0, "seconds": 100, "limit": 180}
    assert (found["tests"]["passed"], found["tests"]["failure"], found["tests"]["skipped"]) == (2, 1, 1)
    assert found["tests"]["reasons"] == {"no second GPU": 1}
    assert found["tests"]["failures"] == ["bad"]
    assert (found["check"]["ok"], found["check"]["not ok"]) == (1, 1)
    assert found["bench"] == {"rows": [1, 2]}
    assert found["versions"]["torch"]


def test_gpu_report_fails_where_a_part_failed(folder):
    """By its exit status, by time running out before it wrote anything, or because nothing ran."""
    assert report(folder, "tests:1:9:270", "check:0:3:60")[0] == 1
    (folder / "bench.json").unlink()
    status, found = report(folder, "bench:124:180:180")
    assert status == 1
    assert "bench.json" in found["bench"]["missing"]
    assert report(folder, "check:0:3:60")[0] == 0
    assert report(folder)[0] == 1


def test_gpu_suite_without_a_gpu(tmp_path):
    """The tests are not left out silently: the suite fails."""
    command = ["bash", "scripts/gpu_suite.sh", str(tmp_path), "--tests", "60", "--check", "0", "--bench", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": "--ignore-glob=*test_[!c]*"}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "--require-gpu: no CUDA device" in (tmp_path / "tests.log").read_text()
    assert "failed: tests" in done.stdout
