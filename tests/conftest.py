"""Shared by all tests: each skip has a reason and is counted; GPU tests are left out where no GPU is."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

with contextlib.suppress(ImportError):
    from hypothesis import settings

    # No deadline: the first call of a kernel compiles it.
    settings.register_profile("l1attn_cupy", deadline=None, print_blob=True)
    settings.load_profile("l1attn_cupy")

# What pytest reports for a skip whose author gave no reason.
NO_REASON = {"", "Skipped", "unconditional skip"}

skips_key = pytest.StashKey[set[tuple[str, str]]]()  # (test, reason): doctests collect a file twice
gpu_left_out_key = pytest.StashKey[int]()
executed_key = pytest.StashKey[int]()  # kernels that pytest-xdist's workers have run by emulation


@functools.cache
def why_no_gpu() -> str:
    """Why GPU tests cannot run here; "" where they can.

    Asks the driver itself: importing CuPy or torch for it would cost a second in every run.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA device"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "no CUDA device"
    return "" if importlib.util.find_spec("cupy") else "CuPy is not installed"


@pytest.fixture(scope="session")
def have_gpu() -> bool:
    """Whether kernels can be launched, for tests that do more where they can."""
    return not why_no_gpu()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail instead of leaving GPU tests out")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        os.environ.pop("COLUMNS", None)  # pytest-xdist says 80 to its workers, though they write to no terminal
    if config.getoption("--require-gpu") and why_no_gpu():
        raise pytest.UsageError(f"--require-gpu: {why_no_gpu()}")
    config.stash[skips_key] = set()
    config.stash[gpu_left_out_key] = config.stash[executed_key] = 0
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_FromWorkers(config))


class _FromWorkers:
    """Takes up what `pytest_sessionfinish` of each of pytest-xdist's workers left."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        left = getattr(node, "workeroutput", {})
        self.config.stash[skips_key] |= {(test, reason) for test, reason in left.get("skips", ())}
        self.config.stash[gpu_left_out_key] = max(self.config.stash[gpu_left_out_key], left.get("gpu_left_out", 0))
        self.config.stash[executed_key] += left.get("executed", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        stash = session.config.stash
        session.config.workeroutput["skips"] = sorted(stash[skips_key])
        session.config.workeroutput["gpu_left_out"] = stash[gpu_left_out_key]
        session.config.workeroutput["executed"] = _kernels_executed()


@pytest.hookimpl(trylast=True)  # after -k and -m, so that only tests asked for are counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or not why_no_gpu():
        return
    config.stash[gpu_left_out_key] = len(gpu_items)
    config.hook.pytest_deselected(items=gpu_items)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def _count_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """Count a skip under its reason; turn one without a reason into a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    reason = reason.removeprefix("Skipped:").strip()
    if reason in NO_REASON:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped without a reason: give one"
    else:
        config.stash[skips_key].add((report.nodeid, reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    _count_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _count_skip(report, collector.config)
    return report


def _kernels_executed() -> int:
    """Kernels that the emulator has run in this process."""
    engine = sys.modules.get("l1attn_cupy.emulator.engine")
    return engine.kernels_executed() if engine else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skips = Counter(reason for _, reason in config.stash[skips_key])
    terminalreporter.section(f"skipped: {skips.total()}")
    for reason, count in skips.most_common():
        terminalreporter.write_line(f"{count:5d}  {reason}")
    if config.stash[gpu_left_out_key]:
        terminalreporter.write_line(f"{config.stash[gpu_left_out_key]} gpu tests not run: {why_no_gpu()}")
    executed = config.stash[executed_key] + _kernels_executed()
    terminalreporter.section(f"kernels executed by the emulator: {executed}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of the user's own kernels."""
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path))
    return tmp_path
