"""What is made of times, with a clock that says what it is told: no GPU is needed for that."""

from __future__ import annotations

import itertools

import pytest
from lab_cases import GATHER, damaged

from l1attn_cupy.cuda import devices, registry
from l1attn_cupy.lab import checking, gpu, problems, screen, timing, trying
from l1attn_cupy.lab.shapes import Shape, parse

SHAPE = Shape(2, 10, 10, 5)  # 1,000 terms
LIMIT = 1e-3  # seconds of 1e9 terms


class Clock:
    """Each call takes as many seconds as were laid down for whoever is called."""

    def __init__(self):
        self.now = 0.0

    def before_call(self):
        pass

    def stamp(self):
        return self.now

    def seconds(self, start, end):
        return end - start


@pytest.fixture
def clock(monkeypatch):
    """A clock, and what moves it: a function that lays down the seconds of each variant's calls, in turn."""
    made, laid = Clock(), {}

    def prepare(name, dtype, shape):
        def call():
            made.now += next(laid[name])

        return call

    def lay(**seconds):
        laid.update({name: itertools.cycle(values) for name, values in seconds.items()})

    limit = type("Limit", (), {"__init__": lambda *_: None, "seconds_per_1e9_terms": lambda _: LIMIT})
    monkeypatch.setattr(gpu, "CudaClock", lambda: made)
    monkeypatch.setattr(gpu, "CudaLimit", limit)
    for name, op in problems.OPS.items():
        monkeypatch.setitem(problems.OPS, name, op._replace(prepare=prepare))
    return lay


def variant(name, op="scores_forward"):
    return next(v for v in registry.variants(op) if v.name == name)


def test_rank_rates_shares_and_ratios(clock):
    """1,000 terms in 2 microseconds are 5e8 a second; the limit is 1e12."""
    clock(gather=[2e-6], tiled=[1e-6])
    slow, fast = timing.rank({"this": variant("gather"), "default": variant("tiled")}, "float32", SHAPE)
    assert (slow.role, fast.role) == ("this", "default")
    assert slow.milliseconds == pytest.approx(2e-3)
    assert slow.rate == pytest.approx(5e8)
    assert slow.share == pytest.approx(5e8 / 1e12)
    assert (slow.ratio, fast.ratio) == (pytest.approx(1), pytest.approx(0.5))


def test_rank_takes_ratios_within_a_round(clock):
    """The GPU's clock changes from round to round: both are slower then, and neither gains."""
    rounds = [1e-6, 5e-6, 2e-6]
    clock(gather=rounds, tiled=[t / 4 for t in rounds])
    _, fast = timing.rank({"this": variant("gather"), "default": variant("tiled")}, "float32", SHAPE)
    assert fast.ratio == pytest.approx(0.25)


def test_rank_backward_counts_both_gradients(clock):
    clock(gather=[2e-6])
    (one,) = timing.rank({"this": variant("gather", "scores_backward")}, "float64", SHAPE)
    assert one.rate == pytest.approx(1e9)
    assert one.share is None  # of float64 gradients no limit is measured


def test_compare_with_the_origin_and_the_default(clock, tmp_path, monkeypatch):
    """In each dtype that the file takes for this shape; the default with the parameters tuned for the card."""
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path))
    monkeypatch.setattr(devices, "names", lambda *_: ("NVIDIA H200", "sm_90"))
    clock(mine=[1e-6], gather=[2e-6], tiled=[4e-6])
    file = damaged(tmp_path, "scores_forward_mine.cu", dtypes="f32,f64")
    found = list(timing.compare(registry.read(file), registry.read(GATHER)[0], "cuda", SHAPE))
    assert [(one.role, one.variant.name, one.dtype) for one in found] == [
        (role, name, dtype)
        for dtype in ("float32", "float64")
        for role, name in (("this", "mine"), ("origin", "gather"), ("default", "tiled"))
    ]
    assert [round(one.ratio, 3) for one in found[:3]] == [1, 2, 4]


def test_times_are_shown_as_ratio_and_share_of_the_limit(capsys, clock, tmp_path):
    """`lab try` on a GPU, from the events on."""
    clock(gather=[2e-9], tiled=[1e-9])
    timed = timing.rank({"this": variant("gather"), "default": variant("tiled")}, "float32", SHAPE)
    verdict = trying.Verdict(GATHER, 0.0)
    for event in (checking.Read((variant("gather"),), None), *timed, checking.Done(True)):
        verdict.add(event)
    out = screen.console()
    for part in verdict.parts():
        out.print(part)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["float32", "gather", "2e-06", "500", "50%"] in lines
    assert ["float32", "tiled", "(default)", "1e-06", "1000", "100%", "0.50x"] in lines


def test_shape_is_read_as_written():
    assert parse("8x1024x512x64") == Shape(8, 1024, 512, 64)
    assert str(Shape(8, 1024, 512, 64)) == "8x1024x512x64"
    for bad in ("8x8x8", "8x8x8x0", "8x8x8x8x8", "axbxcxd", "", "-1x8x8x8"):
        with pytest.raises(ValueError, match="a shape must be BxLxSxE"):
            parse(bad)
