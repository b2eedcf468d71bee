"""Forward and backward of every case: who takes part, and the tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from benchlib import report
from benchlib.cases import Case, make_inputs
from benchlib.limits import Limits
from benchlib.peers import OURS, PEERS, Peer, Unavailable, our_variants
from benchlib.settings import GIB, Settings
from benchlib.timing import Contest, CpuClock, CudaClock, Entrant, Row
from benchlib.verify import Oracle, WrongResult


def candidates(case: Case, settings: Settings) -> list[tuple[str, Callable[[], Peer]]]:
    """(name, maker) of everyone who might take part; on a GPU also each of our variants."""
    found: list[tuple[str, Callable[[], Peer]]] = [
        (name, partial(PEERS[name], case, settings.device)) for name in settings.peers_for(case)
    ]
    if settings.cuda and OURS in settings.peers and case.group != "grid":
        with suppress(Unavailable):  # then the row of ours says why
            found += [(peer.name, partial(_itself, peer)) for peer in our_variants()]
    return found


def _itself(peer: Peer) -> Peer:
    return peer


def entrants(case: Case, settings: Settings, clock: Any) -> tuple[list[Entrant], list[Row]]:
    """Peers whose result on this case is right, and rows with the reason for each of the others."""
    inputs = make_inputs(case, settings.device, settings.cache_bytes)
    oracle = Oracle(case, *inputs[0])
    ready, failed = [], []
    for name, make in candidates(case, settings):
        try:
            peer = make()
            fitting = case.with_eager_at_most(settings.eager_limit(case)) if peer.broadcasts else case
            if fitting is None:
                raise Unavailable(f"one head needs a tensor of {case.eager_bytes() / case.batch / GIB:.0f} GiB")
            entrant = Entrant(peer, fitting, inputs, clock, settings.ops)
            if entrant.ops:
                entrant.check(oracle)
                ready.append(entrant)
        except Exception as error:  # a peer that breaks is a row that says why, not the end of the run
            note = _reason(error)
            failed += [Row(case.shape, case.dtype, case.group, op, name, note=note) for op in sorted(settings.ops)]
    return ready, failed


def _reason(error: Exception) -> str:
    """First line of the message, with the error's kind unless it is one of our own."""
    kind = "" if isinstance(error, (Unavailable, WrongResult)) else f"{type(error).__name__}: "
    return (kind + (str(error).strip().splitlines() or ["no message"])[0])[:140]


def time_cases(settings: Settings, limits: Limits) -> list[Row]:
    """Time every case; a table for each as it is done, and one for the whole grid at the end."""
    clock = CudaClock() if settings.cuda else CpuClock()
    rows: list[Row] = []
    for case in settings.cases:
        if not settings.has_time("cases", f"shapes of {case.group}, {case.dtype}"):
            continue
        ready, failed = entrants(case, settings, clock)
        contest = Contest(case, ready, limits.of(case.dtype))
        done = contest.run(settings.rounds, settings.budget_s(case)) + failed
        rows += done
        if case.group != "grid":
            print(f"\n{case.shape} {case.dtype}: {case.terms('forward') / 1e9:.3g}e9 terms forward")
            print(report.detailed(done, settings.cuda), flush=True)
        elif sys.stderr.isatty():
            print(f"\r  grid {'x'.join(map(str, case.shape)):24}", end="\r", file=sys.stderr, flush=True)
    for dtype in dict.fromkeys(case.dtype for case in settings.cases if case.group == "grid"):
        part = [row for row in rows if row.group == "grid" and row.dtype == dtype]
        print(f"\nThe original benchmark's shapes, {dtype}: ours, and how many times a peer's rate it is")
        print(report.compact(part))
        print("slower than eager: " + (", ".join(report.slower_than(part, "eager")) or "none"), flush=True)
    return rows
