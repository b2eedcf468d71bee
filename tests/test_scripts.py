"""The scripts from the command line: their help, their tables, their exit status."""

from __future__ import annotations

import subprocess
import textwrap

import pytest
from child import ROOT, start

from l1attn_cupy import config


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``scripts/name``."""
    return start(RUN_SCRIPT, name, *arguments)


RUN_SCRIPT = """
import runpy, sys
sys.argv = [f"scripts/{sys.argv[1]}", *sys.argv[2:]]
sys.path.insert(1, "scripts")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["check.py", "train_digits.py", "bench.py", "bench_int8.py"])
def test_scripts_help(name):
    """It explains every option."""
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert "--help" in done.stdout


def test_readme_has_the_tables_of_all_benchmarks():
    """What ``bench.py --markdown`` would write is there."""
    code = """
        import sys
        sys.path.insert(1, "scripts")
        from benchlib import markdown
        print(markdown.BEGIN + markdown.tables() + markdown.END)
    """
    tables = start(textwrap.dedent(code))
    assert tables.returncode == 0, tables.stderr
    assert tables.stdout.strip() in (ROOT / "README.md").read_text(), "run scripts/bench.py --markdown"
    assert all(file.name in tables.stdout for file in (ROOT / "benchmarks").glob("*.json"))


@pytest.mark.slow
def test_check_all_ok():
    """A row for every score, dtype and kind of input; every one of them ok."""
    done = script("check.py", "--backend", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("cpu ")]
    assert len(rows) == 2 * 4 * 4 * 2
    assert all(row.endswith("   ok") for row in rows)
    assert done.stdout.endswith("\nAll ok.\n")


BREAK = {
    "scores a little off": """
        from l1attn_cupy import run
        right = run.scores
        run.scores = lambda call, query, key: right(call, query, key) * 1.05
    """,
    "NaN in one place": """
        from l1attn_cupy import run
        right = run.scores

        def wrong(call, query, key):
            result = right(call, query, key)
            result.view(-1)[0] = float("nan")
            return result

        run.scores = wrong
    """,
    "gradients exchanged": """
        from l1attn_cupy import run
        right = run.scores_backward
        run.scores_backward = lambda *arguments: tuple(-gradient for gradient in right(*arguments))
    """,
    "gradients of attention exchanged": """
        from l1attn_cupy import run_attention
        right = run_attention.attention_backward

        def wrong(*arguments):
            dquery, dkey, dvalue, dmask = right(*arguments)
            return dquery, -dkey, dvalue, dmask

        run_attention.attention_backward = wrong
    """,
    "an exception": """
        from l1attn_cupy import run

        def wrong(*arguments):
            raise RuntimeError("broken")

        run.scores = wrong
    """,
}


FEW = """
from l1attn_cupy import functions, testing
for known, kept in ((functions.SCORES, "inverse"), (testing.DTYPES, "float32")):
    for name in set(known) - {kept}:
        del known[name]
"""


@pytest.mark.slow
@pytest.mark.parametrize("damage", BREAK)
def test_check_notices(damage):
    """Exit status 1 and a row that says so; one score and one dtype are enough."""
    code = textwrap.dedent(BREAK[damage]) + FEW + RUN_SCRIPT
    done = start(code, "check.py", "--backend", "cpu")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT OK" in done.stdout


def test_check_missing_backend():
    """One that was asked for and is not there is an error that says why, not a silent success."""
    missing = [backend for backend in config.backends() if backend.missing]
    if not missing:
        pytest.skip("every backend can be used here")
    done = script("check.py", "--backend", missing[0].name)
    assert done.returncode == 2
    assert f"the {missing[0].name} backend cannot be used here: {missing[0].missing}"[:60] in done.stderr


def test_check_unknown_backend():
    done = script("check.py", "--backend", "gpu")
    assert done.returncode == 2
    assert "--backend must be one of cpu, cuda, emulator, got gpu" in done.stderr


@pytest.mark.slow
def test_bench_int8_trains_and_quantises():
    """A line for each model, as it is and in 8 bits; after so little training they are alike."""
    done = script("bench_int8.py", "--only", "models", "--seeds", "1", "--epochs", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "seed 0" in line]
    assert [line[0] for line in lines] == ["digits,", "text", "text"]
    assert all(abs(float(before) - float(after)) < 0.05 for *_, before, after in lines)
