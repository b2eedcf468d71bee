"""Interleaved timing: every round times each peer, and the limit, once; rates of one round are compared."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from benchlib.cases import TERMS_PER_PASS, Case
from benchlib.peers import OURS, Peer
from benchlib.verify import Oracle
from l1attn_cupy.lab import gpu

SHORTEST_SAMPLE_S = 0.1
FEWEST_ROUNDS = 3
COPY_BYTES = 256 << 20  # beyond every cache
LONGEST_S = 10.0  # a peer that has taken this long stops even before FEWEST_ROUNDS


class Elapsed(NamedTuple):
    """Seconds on the wall, and seconds that this process's threads had of a core (0 on a GPU)."""

    wall: float = 0.0
    core: float = 0.0

    def plus(self, other: Elapsed) -> Elapsed:
        return Elapsed(self.wall + other.wall, self.core + other.core)


class CpuClock:
    """Wall and core time. Before a sample the threads of the peer before get time to go to sleep."""

    most_calls = 64

    def before_sample(self) -> None:
        time.sleep(0.002)

    def before_call(self) -> None:
        """Nothing: the inputs rotate, and the peers in between have replaced what was in the cache."""

    def stamp(self) -> Elapsed:
        return Elapsed(time.perf_counter(), time.process_time())

    def between(self, start: Elapsed, end: Elapsed) -> Elapsed:
        return Elapsed(end.wall - start.wall, end.core - start.core)

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written together, of a copy by torch on all threads: the best of five."""
        source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(2))
        times = []
        for _ in range(5):
            start = self.stamp()
            target.copy_(source)
            times.append(self.between(start, self.stamp()).wall)
        return 2 * COPY_BYTES / min(times)


class CudaClock(gpu.CudaClock):
    """CUDA events, in the form in which a contest uses a clock."""

    most_calls = 1

    def before_sample(self) -> None:
        torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> Elapsed:
        return Elapsed(self.seconds(start, end))


@dataclass
class Row:
    """One line of the results; rates in 1e9 terms/s."""

    shape: tuple[int, int, int, int]
    dtype: str
    group: str
    op: str
    peer: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    milliseconds: float | None = None
    share_of_limit: float | None = None  # median over the rounds of rate / limit's rate
    share_by_core_time: float | None = None  # the same per second of core time: other processes do not count
    ours_is_faster_by: float | None = None  # median over the rounds of our rate / rate
    gigabytes_per_second: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Series:
    """Rates of one peer or limit by op and round, in 1e9 terms per second of wall and of core time."""

    wall: dict[str, dict[int, float]] = field(default_factory=dict)
    core: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, op: str, turn: int, terms: float, elapsed: Elapsed) -> None:
        if elapsed.wall > 0:
            self.wall.setdefault(op, {})[turn] = terms / elapsed.wall / 1e9
        if elapsed.core > 0:
            self.core.setdefault(op, {})[turn] = terms / elapsed.core / 1e9


def ratio(mine: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]], op: str) -> float | None:
    """Median, over the rounds that both have, of one rate over the other."""
    a, b = mine.get(op, {}), theirs.get(op, {})
    both = [a[turn] / b[turn] for turn in a if turn in b]
    return statistics.median(both) if both else None


class Entrant:
    """One peer on one case, with its inputs prepared and its result checked."""

    def __init__(self, peer: Peer, case: Case, inputs: list[Any], clock: Any, ops: set[str]) -> None:
        self.peer, self.case, self.clock = peer, case, clock
        self.ops = ops & set(peer.ops)
        self.plain = [tuple(peer.prepare(x[: case.batch]) for x in one[:2]) for one in inputs]
        self.leaves = [self._leaves(*one) for one in inputs] if self.ops - {"forward"} else []
        self.series = Series()
        self.spent = 0.0
        self.calls = 1
        self.next_set = 0

    def _leaves(self, q: Any, k: Any, g: Any) -> tuple[Any, Any, Any]:
        """One set for `step`: with gradients unless the peer's backward is called directly."""
        needs_grad = self.peer.backward is None
        q, k = (x[: self.case.batch].detach().requires_grad_(needs_grad) for x in (q, k))
        return q, k, g[: self.case.batch, :, :1] if self.peer.rows_only else g[: self.case.batch]

    def forward(self, index: int) -> tuple[Elapsed, Any]:
        """Time of a forward that keeps nothing for a backward, and the scores."""
        q, k = self.plain[index % len(self.plain)]
        self.clock.before_call()
        with torch.no_grad():
            start = self.clock.stamp()
            out = self.peer.scores(q, k)
            end = self.clock.stamp()
        return self.clock.between(start, end), out

    def step(self, index: int) -> tuple[Elapsed, Elapsed, tuple[Any, Any]]:
        """Time of a forward that keeps what backward needs, of the backward, and (dquery, dkey)."""
        q, k, g = self.leaves[index % len(self.leaves)]
        self.clock.before_call()
        start = self.clock.stamp()
        out = self.peer.scores(q, k)
        middle = self.clock.stamp()
        if self.peer.backward is not None:
            dq, dk = self.peer.backward(g, q, k, out)
        else:
            dq, dk = torch.autograd.grad(out, (q, k), g)
        end = self.clock.stamp()
        return self.clock.between(start, middle), self.clock.between(middle, end), (dq, dk)

    def check(self, oracle: Oracle) -> None:
        """Raise WrongResult if a result is outside the bound; these calls are the warm-up too."""
        begin = time.perf_counter()
        _, out = self.forward(0)
        oracle.check_forward(out, self.peer.rows_only)
        del out
        if self.leaves:
            *_, grads = self.step(0)
            oracle.check_backward(*grads, self.peer.rows_only)
            del grads
        again = time.perf_counter()
        self._once(1)
        each = time.perf_counter() - again
        self.calls = max(1, min(self.clock.most_calls, int(SHORTEST_SAMPLE_S / each)))
        self.spent = min(each, again - begin)

    def _once(self, index: int) -> dict[str, Elapsed]:
        """Times of one call of each op."""
        times = {"forward": self.forward(index)[0]} if "forward" in self.ops else {}
        if self.leaves:
            first, second, _ = self.step(index)
            times |= {"backward": second, "forward+backward": first.plus(second)}
        return times

    def sample(self, turn: int) -> None:
        """One round: `calls` calls of each op, each on the next set of inputs.

        One call ahead of them is not counted: it takes memory from the system that the peers before gave back, and on
        virtual machines also from the host, in tens of milliseconds that say nothing of a peer.
        """
        begin = time.perf_counter()
        total = {op: Elapsed() for op in TERMS_PER_PASS}
        self._once(self.next_set)
        self.clock.before_sample()
        for _ in range(self.calls):
            self.next_set += 1
            for op, elapsed in self._once(self.next_set).items():
                total[op] = total[op].plus(elapsed)
        for op in self.ops:
            self.series.add(op, turn, self.calls * self.case.terms(op), total[op])
        self.spent += time.perf_counter() - begin

    def has_time(self, turn: int, budget_s: float) -> bool:
        """Whether it takes part in this round; everyone does in the first."""
        return turn == 0 or self.spent < (budget_s if turn >= FEWEST_ROUNDS else max(budget_s, LONGEST_S))


def sample_limits(limits: dict[str, Any], held: Series, turn: int) -> None:
    """Measure the limits once; forward+backward's is one part forward and two parts backward in turn."""
    times = {op: limit.sample() for op, limit in limits.items()}  # of 1e9 terms
    if {"forward", "backward"} <= set(times):
        one, two = times["forward"], times["backward"]
        times["forward+backward"] = Elapsed((one.wall + 2 * two.wall) / 3, (one.core + 2 * two.core) / 3)
    for op, elapsed in times.items():
        held.add(op, turn, 1e9, elapsed)


@dataclass
class Contest:
    """All peers of one case and the limits they are held against."""

    case: Case
    entrants: list[Entrant]
    limits: dict[str, Any]  # op -> an object whose sample() gives the time of 1e9 terms

    def run(self, rounds: int, budget_s: float) -> list[Row]:
        """Everyone in turn; a peer leaves when its budget is spent, but not before FEWEST_ROUNDS."""
        held = Series()
        for turn in range(rounds):
            for entrant in self.entrants:
                if entrant.has_time(turn, budget_s):
                    entrant.sample(turn)
            sample_limits(self.limits, held, turn)
        own = next((e.series for e in self.entrants if e.peer.name == OURS), None)
        return [self._row(e, op, held, own) for e in self.entrants for op in e.series.wall]

    def _row(self, entrant: Entrant, op: str, limit: Series, own: Series | None) -> Row:
        case, series = entrant.case, entrant.series
        rates = sorted(series.wall[op].values())
        median = statistics.median(rates)
        seconds = case.terms(op) / median / 1e9
        fewer = f"batch {case.batch} of {self.case.batch}" if case.batch != self.case.batch else ""
        row = Row(self.case.shape, case.dtype, case.group, op, entrant.peer.name, median, rates[0], rates[-1])
        row.samples, row.milliseconds = len(rates), 1e3 * seconds
        row.share_of_limit = ratio(series.wall, limit.wall, op)
        row.share_by_core_time = ratio(series.core, limit.core, op)
        row.ours_is_faster_by = ratio(own.wall, series.wall, op) if own and own is not series else None
        row.gigabytes_per_second = case.bytes_moved(op) / seconds / 1e9
        row.note = ", ".join(filter(None, (entrant.peer.note, fewer)))
        return row
