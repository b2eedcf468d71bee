"""`lab try` and `lab report` for fused attention: right kernels pass, and what attention can do wrong is noticed."""

from __future__ import annotations

import re

import pytest
from child import ROOT
from lab_cases import damaged, lab

from l1attn_cupy.cuda import machine_code, registry
from l1attn_cupy.lab import checking

NO_TOOLS = machine_code.missing()
FORWARD = registry.packaged_folder() / "attention_forward_gather.cu"
BACKWARD = registry.packaged_folder() / "attention_backward_gather.cu"


def test_try_attention_right(capsys, folder):
    """Every line of the file: those for few queries get few."""
    status, text = lab(capsys, "try", damaged(folder, "attention_forward_mine.cu", file=FORWARD, dtypes="f32"))
    assert status == 0, text
    lines = [variant.line for variant in registry.read(FORWARD)]
    assert re.findall(r"^right +float32, line (\d+): \d problems", text, re.MULTILINE) == list(map(str, lines))


def test_try_attention_backward_right(capsys, folder):
    status, text = lab(capsys, "try", damaged(folder, "attention_backward_mine.cu", file=BACKWARD, dtypes="f64"))
    assert status == 0, text
    assert re.search(r"^right +float64, line \d+: \d problems", text, re.MULTILINE)


FAULTS = {
    "mask forgotten": (
        FORWARD,
        ("masked(a, b, i, j0 + n + m, score_of(distance, a))", "score_of(distance, a)"),
    ),
    "sums not scaled down": (FORWARD, ("sum *= factor;", "")),
    "NaN that is ruled out": (
        FORWARD,
        ("left[n] ? sum + weights[n] * value : sum", "sum + weights[n] * value"),
    ),
    "wrong end of the window": (BACKWARD, ("first_query(a, row) :", "0 :")),
    "sign of ties": (BACKWARD, ("h[n] * sign(", "h[n] * (mine < 0 ? -1 : 1) * sign(")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_try_attention_fault(capsys, folder, fault):
    file, change = FAULTS[fault]
    op = file.stem.removesuffix("_gather")
    status, text = lab(capsys, "try", damaged(folder, f"{op}_mine.cu", change, file=file))
    assert status == 1, text
    assert re.search(r"WRONG +float32", text)


@pytest.mark.skipif(bool(NO_TOOLS), reason=NO_TOOLS or "-")
def test_report_attention(capsys, folder):
    """All variants for the shape; rows of a benchmark's file are calls of scores, and not shown as peers."""
    bench = ROOT / "benchmarks" / "nvidia-h100-80gb-hbm3.json"
    file = folder / "page.html"
    status, text = lab(capsys, "report", "attention_forward", "--output", file, "--bench", bench)
    assert status == 0, text
    page = file.read_text()
    for variant in registry.variants("attention_forward"):
        fits = variant.fits("float32", {"q": 1024, "k": 1024, "e": 64, "v": 64})
        assert (f"<td>{variant.name}:{variant.line}</td>" in page) == fits
    assert "cdist" not in page


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_try_attention_of_bytes(dtype):
    """All problems, those with NaN and infinity without them in query and key."""
    (variant,) = [v for v in registry.variants("attention_forward") if dtype in v.dtypes]
    assert isinstance(checking.check(variant, dtype, "emulator"), checking.Right)
