"""Work that may crash or never end, in a process of its own, so that the session goes on.

The process is forked from a server that has imported torch and the library already: it starts in a few milliseconds,
has used no GPU and no threads yet, and can be killed without a trace.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ..cuda.registry import KernelError

#: Beside the time limit of a kernel, seconds for compilers.
COMPILING = 60.0


class Died(NamedTuple):
    """The last event where the process did not come to its end."""

    message: str


class _End(NamedTuple):
    """The work is done."""


def warm_up() -> None:
    """Start the server that children are forked from, and let it import."""
    if sys.platform != "win32":
        from multiprocessing import forkserver

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["l1attn_cupy.lab.preload"])
        forkserver.ensure_running()


def stream(work: Callable[..., Iterator[Any]], *arguments: Any, limit: float) -> Generator[Any, None, None]:
    """What ``work(*arguments)`` yields in a child process; `Died` at last if it crashed, or was silent for ``limit`` s.

    ``work`` is a function of a module, its arguments and what it yields can be pickled.
    """
    warm_up()
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, dict(os.environ), work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(limit):
                yield Died(f"no answer for {limit:g} s: stopped (--limit sets how long to wait)")
                return
            try:
                event = ours.recv()
            except EOFError:
                process.join(limit)
                yield Died(f"the kernel ended the process that ran it: {_how_it_ended(process.exitcode)}")
                return
            if isinstance(event, _End):
                return
            yield event
            if isinstance(event, Died):
                return
    finally:
        _stop(process)
        ours.close()


def first(work: Callable[..., Iterator[Any]], *arguments: Any, limit: float) -> Any:
    """The one thing that ``work(*arguments)`` yields in a child process, or `Died`."""
    with contextlib.closing(stream(work, *arguments, limit=limit)) as events:
        return next(events)


def _child(pipe: Connection, environment: dict[str, str], work: Callable[..., Iterator[Any]], arguments: tuple) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, with the compilers that it starts
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.suppress(BrokenPipeError):
        try:
            for event in work(*arguments):
                pipe.send(event)
            pipe.send(_End())
        except KernelError as error:
            pipe.send(Died(str(error)))
        except Exception:  # a fault of the lab: all that is known of it, as the process ends here
            pipe.send(Died(traceback.format_exc()))


def _stop(process: Any) -> None:
    process.join(0.2)
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.join()


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exitcode).name
    return f"exit status {exitcode}"
