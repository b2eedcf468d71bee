"""Many training runs at once, each on one thread of a process of its own, under one progress bar each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Setting = TypeVar("Setting")
Result = TypeVar("Result")
Report = Callable[[int, str], None]  # steps done, and a word on how it goes

INTERVAL = 0.2  # seconds between two looks at a run

_reports: Any = None  # in a process of the pool: the queue to the bars, and the event that ends all runs
_stop: Any = None


class Stopped(Exception):
    """Another run failed, or the user pressed Ctrl-C."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _enter(reports: Any, stop: Any) -> None:
    """First call in a process of the pool. Models this small gain nothing from a second thread."""
    global _reports, _stop
    _reports, _stop = reports, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which sets `stop`
    torch.set_num_threads(1)


def _work(train: Callable[[Setting, Report], Result], number: int, setting: Setting, steps: int) -> Result:
    """Run `number` in a process of the pool; its reports are passed on as often as anyone looks."""
    last = 0.0

    def report(step: int, state: str) -> None:
        nonlocal last
        if _stop.is_set():
            raise Stopped
        if step == steps or time.monotonic() - last > INTERVAL:
            last = time.monotonic()
            _reports.put((number, step, state))

    return train(setting, report)


def run_all(
    train: Callable[[Setting, Report], Result],
    settings: dict[str, Setting],
    steps: int,
    processes: int,
    console: Console,
) -> list[Result]:
    """Results of `train(setting, report)` for each setting, in their order.

    `train` must be a function of a module, for it is called in other processes; the keys name the bars, which are
    full after `steps`. Where the console is no terminal, a line for each finished run takes the place of the bars.
    An exception in one run ends the others and is raised here.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    reports, stop = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(min(processes, len(settings)), context, _enter, (reports, stop))
    with make_bars(settings, steps, console) as bars:
        try:
            futures = [pool.submit(_work, train, i, setting, steps) for i, setting in enumerate(settings.values())]
            unfinished = set(futures)
            while unfinished:
                finished, unfinished = wait(unfinished, INTERVAL, FIRST_COMPLETED)
                show(bars, reports)
                for future in finished:
                    future.result()
                    if not console.is_terminal:
                        bar = bars.tasks[futures.index(future)]
                        console.print(f"{bar.description}  {bar.fields['state']}", highlight=False)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def make_bars(names: Iterable[str], steps: int, console: Console) -> Progress:
    """A bar for each run, none of them started."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    for name in names:
        bars.add_task(name, total=steps, start=False, state="")
    return bars


def show(bars: Progress, reports: Any) -> None:
    """Move the bars to what the runs have reported."""
    while not reports.empty():
        number, step, state = reports.get()
        bar = bars.tasks[number]
        if not bar.started:
            bars.start_task(bar.id)
        bars.update(bar.id, completed=step, state=state)
