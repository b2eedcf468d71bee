"""The kernel lab on a GPU: right kernels are timed beside others and the limit, wrong ones never."""

from __future__ import annotations

import re

import pytest
from lab_cases import damaged, lab

from l1attn_cupy.cuda import tuning

pytestmark = pytest.mark.gpu
NAME = "scores_forward_mine.cu"
DELTA = ("Delta     nothing", "Delta     like scores_forward_gather.cu: nothing")


def test_try_times_a_right_kernel(capsys, folder):
    """Beside the one it was copied from, of the same speed, and the default; each as a share of the limit."""
    status, text = lab(capsys, "try", damaged(folder, NAME, DELTA), "--shape", "8x512x512x64")
    assert status == 0, text
    assert "on the GPU, " in text
    rows = re.findall(r"^float32 +(mine|gather|tiled)\b.* (\d+)% *([\d.]+x)? *$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["mine", "gather", "tiled"], text
    assert all(0 < int(share) <= 105 for _, share, _ in rows)
    assert 0.7 < float(rows[1][2][:-1]) < 1.4


@pytest.mark.parametrize(
    "change",
    [
        ("to_scalar(result[0])", "to_scalar(2 * result[0])"),
        ("out[j0 + column] =", "out[(1ll << 40) + column] ="),
    ],
    ids=["wrong number", "illegal address"],
)
def test_try_never_times_a_wrong_kernel(capsys, folder, change):
    status, text = lab(capsys, "try", damaged(folder, NAME, change))
    assert status == 1
    assert "WRONG" in text
    assert "time on the GPU" not in text
    assert lab(capsys, "try", damaged(folder, NAME))[0] == 0


def test_try_stops_a_kernel_that_never_ends(capsys, folder):
    """The process is killed, and the GPU can be used by the next one."""
    endless = (
        "    const int column = threadIdx.x;\n",
        "    const int column = threadIdx.x;\n    while (p.length_k > 0) {}\n",
    )
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr("l1attn_cupy.lab.child.COMPILING", 20.0)
        status, text = lab(capsys, "try", damaged(folder, NAME, endless), "--limit", "1")
    assert status == 1
    assert "no answer for 21 s: stopped" in text
    assert lab(capsys, "try", damaged(folder, NAME))[0] == 0


def test_tune_by_time(capsys, folder):
    """The winner is written for this card, and the next call uses it."""
    damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32,64,512"))
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", "8x512x512x64")
    assert status == 0, text
    (file,) = (folder / "tuning").iterdir()
    (entry,) = tuning.read(file)
    assert entry.by == "time"
    assert not entry.device.startswith("sm_")
    assert entry.parameters["BLOCK_K"] in (32, 64)


def test_report_is_measured(capsys, folder):
    file = folder / "page.html"
    assert lab(capsys, "report", "scores_forward", "--output", file)[0] == 0
    assert "Rates were measured on the GPU" in file.read_text()
