"""Growth of one peer, in a process of its own: time and memory at each length, a line of JSON each.

python -m benchlib.growth_probe --device cpu --peer ours --length 65536

A line is printed as soon as a length has its first sample, and again with all of them, so that what was measured stays
if memory or time runs out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchlib.attention_peers import check, check_gradients, inputs, makers
from benchlib.cases import TERMS_PER_PASS, Case, make_inputs
from benchlib.peers import OURS, PEERS, cdist_cannot, with_inductor
from benchlib.peers import naive as naive_scores
from benchlib.probe import MIB, peak_of, waiter
from benchlib.timing import CpuClock, CudaClock, Elapsed
from benchlib.verify import Oracle

SHORTEST, LONGEST, CHANNELS = 128, 65536, 64
KINDS = ("attention forward", "attention forward+backward", "scores forward")
SCORES_PEERS = (OURS, "cdist", "compile")
ROWS = {"cpu": 4096, "cuda": 65536}  # of query in a call: heads get fewer as they get longer, down to one
MEMORY_SHARE = 0.5  # of what is free: the most that a call may need
SHORTEST_SAMPLE_S = {"cpu": 0.1, "cuda": 0.0}
FEWEST = 3
NEW_PAGES_MIB = 256  # a first result this large takes memory from the system for the first time, which is slow


@dataclass(frozen=True)
class Patience:
    """Seconds that something may take; ``call`` is the longest call that is tried."""

    series: float  # samples of one length, once there are FEWEST
    call: float
    length: float = 8.0  # samples of one length, however few


PATIENCE = {
    ("cpu", True): Patience(0.4, 80.0),
    ("cpu", False): Patience(0.4, 1.2),
    ("cuda", True): Patience(0.25, 10.0),
    ("cuda", False): Patience(0.15, 0.6),
}


@dataclass
class Point:
    """One length: its call on as many heads as make up the rows, its memory, and the time of a call by sample."""

    length: int
    heads: int
    call: Callable[[], Any]
    memory: dict[str, float]
    samples: list[Elapsed] = field(default_factory=list)
    spent: float = 0.0

    def terms(self, kind: str) -> int:
        """Of one call; those of a backward pass count as in `cases`."""
        return TERMS_PER_PASS[kind.split()[1]] * self.heads * self.length**2 * CHANNELS

    def describe(self, kind: str) -> dict[str, Any]:
        """What is printed of it."""
        wall = [1e3 * sample.wall for sample in self.samples]
        core = statistics.median(1e3 * sample.core for sample in self.samples)
        times = {"ms": statistics.median(wall), "low": min(wall), "high": max(wall), "samples": len(wall)}
        per_term = {
            "ps per term": 1e9 * times["ms"] / self.terms(kind),
            "core ps per term": 1e9 * core / self.terms(kind),
        }
        return {"kind": kind, "length": self.length, "heads": self.heads, **times, **per_term, **self.memory}


def functions(peer: str, device: str) -> dict[str, Callable[..., Any]]:
    """kind -> function of query, key, value and a gradient; its results have been checked at an odd length."""
    torch._dynamo.config.recompile_limit = 64  # torch.compile specialises for one head, and for a few lengths
    given = inputs((3, 257, 257, CHANNELS), device)
    attention = makers(device, [peer], dynamic=True)[peer]()
    check(peer, attention, *given[:3])
    check_gradients(peer, attention, given)

    def both(query: Any, key: Any, value: Any, grad: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    found = {KINDS[0]: lambda q, k, v, _: (attention(q, k, v),), KINDS[1]: both}
    if peer in SCORES_PEERS:
        case = Case("user", 3, 257, 257, CHANNELS, "float32")
        one = make_inputs(case, device, 0)[0]
        dynamic = with_inductor(naive_scores, device, dynamic=True)
        scores = dynamic if peer == "compile" else PEERS[peer](case, device).scores
        Oracle(case, *one).check_forward(scores(*one[:2]), rows_only=False)
        found[KINDS[2]] = lambda q, k, *_: (scores(q, k),)
    return found


class Probe:
    """Measures one kind, length by length."""

    def __init__(self, options: argparse.Namespace, clock: Any) -> None:
        self.options, self.device, self.clock = options, options.device, clock
        self.patience = PATIENCE[options.device, options.peer == OURS]

    def run(self, kind: str, function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
        """All lengths once, then round after round, so that a busy moment does not hit one length alone."""
        points: list[Point] = []
        length = SHORTEST
        while length <= self.options.length:
            if points and (why := self.too_much(points[-1], length)):
                yield {"kind": kind, "length": length, "note": why}
                break
            points.append(self.first(function, length))
            yield points[-1].describe(kind)
            length *= 2
        while waiting := [point for point in points if self.has_time(point)]:
            for point in waiting:
                self.sample(point)
        yield from (point.describe(kind) for point in points)

    def too_much(self, last: Point, length: int) -> str:
        """Why this length is not tried after the last, or nothing."""
        if self.options.peer == "cdist" and (why := cdist_cannot(self.device, length, length, CHANNELS)):
            return why
        heads = max(1, ROWS[self.device] // length)
        seconds = min(last.samples).wall * heads * length**2 / (last.heads * last.length**2)
        if seconds > self.patience.call:
            return f"a call would take about {seconds:.1f} s"
        mib, free = heads * 4 * sum(last.memory[key] for key in ("outputs_mib", "beyond_mib")), free_mib(self.device)
        if mib > MEMORY_SHARE * free:
            return f"a call may need {mib / 1024:.0f} GiB, and {free / 1024:.0f} are free"
        return ""

    def first(self, function: Callable[..., Any], length: int) -> Point:
        """Memory of one head, and a first sample; a long call on one head is its own, if it writes little."""
        heads = max(1, ROWS[self.device] // length)
        given = inputs((heads, length, length, CHANNELS), self.device)
        one = [x[:1] for x in given]
        function(*(x[:, :SHORTEST] for x in one))  # compiles, starts threads
        gc.collect()
        start = self.clock.stamp()
        peak, results = peak_of(lambda: function(*one), self.device)
        elapsed = self.clock.between(start, self.clock.stamp())
        taken, made = (sum(x.nbytes for x in arrays) / MIB for arrays in (one, results))
        memory = {"inputs_mib": taken, "outputs_mib": made, "beyond_mib": max(0.0, peak / MIB - made)}
        del results
        point = Point(length, heads, lambda: function(*given), memory)
        if heads == 1 and elapsed.wall > self.patience.series and made < NEW_PAGES_MIB:
            point.samples.append(elapsed)
            point.spent = elapsed.wall
        else:
            self.sample(point)
        return point

    def has_time(self, point: Point) -> bool:
        """Whether it gets another sample."""
        each = point.spent / len(point.samples)
        enough = self.patience.series if len(point.samples) >= FEWEST else self.patience.length
        return point.spent + each < enough and len(point.samples) < self.options.rounds

    def sample(self, point: Point) -> None:
        """Mean of a call over at least SHORTEST_SAMPLE_S, after one that is not counted."""
        begin = time.perf_counter()
        point.call()
        self.clock.before_sample()
        waiter(self.device)()
        calls = max(1, min(64, int(SHORTEST_SAMPLE_S[self.device] / (time.perf_counter() - begin))))
        total = Elapsed()
        for _ in range(calls):
            self.clock.before_call()
            start = self.clock.stamp()
            point.call()
            total = total.plus(self.clock.between(start, self.clock.stamp()))
        point.samples.append(Elapsed(total.wall / calls, total.core / calls))
        point.spent += time.perf_counter() - begin


def free_mib(device: str) -> float:
    """What a new call can still get."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / MIB
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4096.0  # not known here: a guess that any machine of today has


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchlib.growth_probe", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peer", default=OURS)
    parser.add_argument("--length", type=int, default=LONGEST)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    probe = Probe(options, CudaClock() if options.device == "cuda" else CpuClock())
    for kind, function in functions(options.peer, options.device).items():
        try:
            for found in probe.run(kind, function):
                print(json.dumps(found), flush=True)
        except Exception as error:  # the other kinds may still do
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:140]
            print(json.dumps({"kind": kind, "error": text}), flush=True)


if __name__ == "__main__":
    main()
