"""`lab try`: right kernels are told from wrong ones, and each mistake gives one message with file and line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from child import ROOT
from lab_cases import GATHER, damaged, lab, line_of

from l1attn_cupy.cuda import machine_code, registry
from l1attn_cupy.lab import checking, child, problems, shapes

NAME = "scores_forward_mine.cu"
STORE = "out[j0 + column] = to_scalar(result[0]);"
BARRIER = "    __syncthreads();  // the distances come from all warps; they leave together, coalesced"


def test_try_right(capsys, folder):
    """A copy of a good kernel: what it runs on, every dtype right, machine code beside that of the origin."""
    file = damaged(folder, NAME, dtypes="f32,f64")
    status, text = lab(capsys, "try", file)
    assert status == 0, text
    assert 'variant "mine" of scores_forward' in text
    assert "by emulation on the CPU" in text
    assert re.findall(r"^right +(\w+), line 7: 9 problems", text, re.MULTILINE) == ["float32", "float64"]
    assert "not timed: there is no GPU" in text
    assert 'All right. Use it by variant="mine".' in text


@pytest.mark.skipif(bool(machine_code.missing()), reason=machine_code.missing() or "-")
def test_try_shows_machine_code_beside_the_origin(capsys, folder):
    """Registers, spills, shared memory, and instructions per term beside the budget: those of `machine_code`."""
    file = damaged(folder, NAME, ("Delta     nothing", "Delta     like scores_forward_gather.cu: nothing"))
    status, text = lab(capsys, "try", NAME)
    assert status == 0, text
    profile = machine_code.profile(registry.read(file)[0], "float32")
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("7 f32"))
    before = next(line.split() for line in text.splitlines() if line.strip().startswith("before"))
    found = profile.resources
    assert row[2:5] == [str(found.registers), str(found.spilled), str(found.shared)]
    assert float(row[-2]) == pytest.approx(profile.loop.slots_per_term, abs=0.01)
    assert row[-1] == "2"
    assert before[1:] == row[2:]


FAULTS = {
    "syntax error": (
        [("acc_t sum = 0;", "acc_t sum = ;")],
        "acc_t sum = ;",
        r"{file}:{line}:\d+: error: expected primary-expression before ';'",
    ),
    "unknown name": ([("acc_t sum = 0;", "acc_t sum = zero;")], "= zero", r"{file}:{line}:\d+: error: .*zero"),
    "wrong entry name": (
        [("__launch_bounds__(THREADS) scores_forward(", "__launch_bounds__(THREADS) score_forward(")],
        "score_forward(const",
        r"{file}:{line}: the entry point must be .*void scores_forward\(const ScoresForward p\), got the name score_fo",
    ),
    "wrong parameter": (
        [("(const ScoresForward p)", "(const ScoresBackward p)")],
        "(const ScoresBackward",
        r"{file}:{line}: the entry point must be .*, got the parameter ScoresBackward",
    ),
    "no kernel": (
        [("__global__", "__device__")],
        "// scores",
        r"{file}:1: there is no kernel: its entry point must be",
    ),
    "unknown key": (
        [("rank=0", "speed=9")],
        "speed=9",
        r"{file}:{line}: unknown key speed; known are op, dtypes, rank",
    ),
    "key given twice": ([("rank=0", "THREADS=64")], "@variant", r"{file}:{line}: THREADS is given twice"),
    "no UTF-8": ([("the baseline", "the b\udce4seline")], "the b", r"{file}:1: not UTF-8 text: invalid"),
    "static_assert": (
        [("BLOCK_K=32 THREADS=256", "BLOCK_K=32 THREADS=48")],
        "% 32 == 0",
        r"{file}:{line}:\d+: error: static assertion failed: whole warps, for the shuffles",
    ),
    "write out of bounds": (
        [
            (STORE, "out[p.length_q * p.length_k + column] = to_scalar(result[0]);"),
        ],
        "out[p.length_q",
        r"out-of-bounds write of 4 bytes: out\[...\], byte offset \d+ of 8580\s.*of block 0, {name}:{line}",
    ),
    "race": ([(BARRIER, "")], "distance[column]}", rf"race: read of shared distance\[...\].* wrote at {NAME}:\d+"),
    "barrier that some threads miss": (
        [(BARRIER, "    if (threadIdx.x < 32) __syncthreads();")],
        "if (threadIdx.x < 32)",
        r"divergent barrier, no thread of the block can go on(?s:.)*{name}:{line}",
    ),
    "never ends": (
        [(BARRIER, BARRIER + "\n    while (p.channels >= 0) {}")],
        "while (p.channels",
        r"still running after the time limit of 1 s(?s:.)*{name}:{line}",
    ),
    "wrong number": (
        [("to_scalar(result[0])", "to_scalar(result[0] * (j0 + column == 64 ? 1.001f : 1))")],
        "@variant",
        r"odd sizes: L=33 S=65 E=33(?s:.)*scores\[0, 0, 64\] must be 0\.\d+, got 0\.\d+ \(33 of 2145 are wrong\)",
    ),
    "NaN lost": (
        [("acc_t result[1] = {distance[column]};", "acc_t result[1] = {fmaxf(distance[column], 0)};")],
        "@variant",
        r"NaN and infinity: (?s:.)*scores\[0, \d+, \d+\] must be nan, got -0",
    ),
    "ties lost": (
        [("acc_t result[1] = {distance[column]};", "acc_t result[1] = {distance[column] + 1e-3f};")],
        "@variant",
        r"WRONG(?s:.)*scores\[0, \d+, \d+\] must be",
    ),
    "rows taken for neighbours": (
        [("i * p.q.row_stride", "i * p.channels")],
        "@variant",
        r"rows apart in memory(?s:.)*scores\[0, 1, 0\] must be [\d.]+, got nan",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_try_fault(capsys, folder, fault):
    """Exit status 1, one message with file and line, nothing timed; and the session goes on."""
    changes, part, pattern = FAULTS[fault]
    file = damaged(folder, NAME, *changes)
    expected = pattern.format(file=re.escape(str(file)), name=NAME, line=line_of(file, part))
    status, text = lab(capsys, "try", file, "--limit", "1")
    assert status == 1, text
    assert re.search(expected, text), text
    assert "Not right yet: nothing was timed." in text
    assert len(re.findall("^(?:WRONG|ERROR)", text, re.MULTILINE)) == 1
    assert "Traceback" not in text


def test_try_after_a_fault(capsys, folder):
    """The same session, the same file: mended."""
    damaged(folder, NAME, (BARRIER, BARRIER + "\n    while (p.channels >= 0) {}"))
    assert lab(capsys, "try", NAME, "--limit", "1")[0] == 1
    damaged(folder, NAME)
    assert lab(capsys, "try", NAME, "--limit", "30")[0] == 0


def test_try_backward_wrong_sign(capsys, folder):
    """The first wrong element of the gradient that is wrong."""
    source = registry.packaged_folder() / "scores_backward_gather.cu"
    change = ("t.x_is_row ? i : j, column", "t.x_is_row ? i : j, zero = 0, column")
    file = damaged(folder, "scores_backward_mine.cu", change, ("= to_scalar(sum)", "= to_scalar(is_dq ? sum : -sum)"),
                   file=source)  # fmt: skip
    status, text = lab(capsys, "try", file)
    assert status == 1
    assert re.search(r"dkey\[0, 0, 0\] must be -?[\d.]+, got -?[\d.]+ \(\d+ of 2145 are wrong\)", text), text


def test_try_says_that_a_name_is_there_twice(capsys, folder):
    """One's own file replaces the packaged one of the same name; better to know it."""
    status, text = lab(capsys, "try", damaged(folder, GATHER.name))
    assert status == 0, text
    assert f"there is another file of this name, {GATHER}; the one in L1ATTN_KERNELS is used" in text


def test_try_beside_a_file_that_is_broken(capsys, folder):
    """Calls without a variant's name fail on it; what is tried is right all the same, and the other is named."""
    other = damaged(folder, "scores_forward_broken.cu", ("rank=0", "speed=9"))
    file = damaged(folder, NAME, ("Delta     nothing", "Delta     like scores_forward_gather.cu: nothing"))
    status, text = lab(capsys, "try", file)
    assert status == 0, text
    assert f"not compared with other variants: {other}:7: unknown key speed" in text


def test_try_op_that_the_lab_does_not_know(capsys, folder, monkeypatch):
    """One that was added to the registry alone."""
    monkeypatch.delitem(problems.OPS, "scores_forward")
    events = list(checking.attempt(damaged(folder, NAME), "emulator", "90", 1.0, shapes.USUAL))
    rest = ", ".join(problems.OPS)
    assert events[0].message == f"{folder / NAME}:7: the lab cannot check scores_forward yet, only {rest}"
    status, text = lab(capsys, "report", "scores_forward")
    assert (status, text) == (2, f"error: the lab cannot report on scores_forward yet, only on {rest}\n")


def test_try_float16_differences_have_a_bound_of_their_own(capsys, folder):
    """What they may be off follows from the distance and the size of the rows; more than that is wrong."""
    source = registry.packaged_folder() / "scores_forward_half2.cu"
    assert lab(capsys, "try", damaged(folder, NAME, file=source, dtypes="f16"))[0] == 0
    worse = ("acc_t zero = 0;", "distance[0][0] *= 1.02f; acc_t zero = 0;")
    status, text = lab(capsys, "try", damaged(folder, NAME, worse, file=source, dtypes="f16"))
    assert status == 1
    assert "WRONG" in text


def test_try_file_anywhere(capsys, tmp_path, monkeypatch):
    """In a folder that L1ATTN_KERNELS does not name, beside files that are no kernels of this library."""
    monkeypatch.delenv("L1ATTN_KERNELS", raising=False)
    (tmp_path / "other.cu").write_text("__global__ void other() {}\n")
    status, text = lab(capsys, "try", damaged(tmp_path, NAME))
    assert status == 0, text
    assert f"with L1ATTN_KERNELS={tmp_path}" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["try", "nowhere.cu"], "FILE must be a .cu file, here or in .*, got nowhere.cu"),
        (["try", GATHER, "--shape", "8x8"], "a shape must be BxLxSxE, such as 8x1024x1024x64, got '8x8'"),
        (["try", GATHER, "--arch", "30"], "--arch must be one of 75, 80, .*, got 30"),
        (["try", GATHER, "--limit", "0"], "must be a positive number of seconds, got 0"),
        (["try", GATHER, "--limit", "soon"], "invalid .* value: 'soon'"),
    ],
)
def test_try_bad_arguments(capsys, folder, arguments, message):
    status, text = lab(capsys, *arguments)
    assert status == 2
    assert re.search(message, text), text


def test_try_cuda_where_there_is_none(capsys, folder, have_gpu):
    if have_gpu:
        pytest.skip("there is a GPU")
    status, text = lab(capsys, "try", damaged(folder, NAME), "--backend", "cuda")
    assert status == 1
    assert "--backend cuda cannot be used here" in text


# ---- the child process --------------------------------------------------------------------------------------------


def work_that_is_killed():
    yield "begun"
    os.kill(os.getpid(), signal.SIGKILL)


def work_that_is_faulty():
    yield "begun"
    raise ZeroDivisionError("of the lab itself")


def work_that_is_silent():
    yield "begun"
    time.sleep(600)


def test_child_killed():
    """A kernel may take its process with it, not the session."""
    events = list(child.stream(work_that_is_killed, limit=30))
    assert events == ["begun", child.Died("the kernel ended the process that ran it: SIGKILL")]


def test_child_faulty():
    """The whole traceback: it is for a bug report."""
    begun, died = child.stream(work_that_is_faulty, limit=30)
    assert begun == "begun"
    assert died.message.startswith("Traceback") and "ZeroDivisionError: of the lab itself" in died.message


def test_child_silent():
    begin = time.perf_counter()
    events = list(child.stream(work_that_is_silent, limit=1))
    assert events == ["begun", child.Died("no answer for 1 s: stopped (--limit sets how long to wait)")]
    assert time.perf_counter() - begin < 20


def test_tidy_keeps_errors_with_their_lines():
    log = "kernel 'k' does not compile: a.cu:3:1: error: bad\na.cu: In function 'f':\na.cu:3:1: error: bad\n    3 | x\n"
    assert checking.tidy(log + "options: -O2\ncompiler: g++") == "a.cu:3:1: error: bad\n    3 | x"


# ---- watch --------------------------------------------------------------------------------------------------------


def test_watch_says_again_on_each_save(folder):
    """Right, wrong, right; each verdict is about the text that was saved."""
    file = damaged(folder, NAME)
    command = [sys.executable, "-u", "-m", "l1attn_cupy.lab", "try", str(file), "--watch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        guard = threading.Timer(180, process.kill)  # or a test that waits for a line waits for ever
        guard.start()
        try:
            seen = [_verdict(process)]
            for changes in ([("to_scalar(result[0])", "to_scalar(-result[0])")], []):
                damaged(folder, NAME, *changes)
                seen.append(_verdict(process))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            guard.cancel()
            process.kill()
    assert [verdict for verdict, _ in seen] == ["All right.", "Not right yet:", "All right."]
    assert all(0 < seconds < 60 for _, seconds in seen)


def _verdict(process) -> tuple[str, float]:
    """The next one, and the seconds that it took from the save."""
    seconds = 0.0
    for line in process.stdout:
        if match := re.search(r"first verdict after ([\d.]+) s", line):
            seconds = float(match[1])
        if match := re.match(r"All right\.|Not right yet:", line):
            return match[0], seconds
    raise AssertionError("it ended")
