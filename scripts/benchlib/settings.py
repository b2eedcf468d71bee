"""What the command line and the machine decide, and the method that every run states first."""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, field

import torch

from benchlib import report
from benchlib.cases import Case, parse
from benchlib.peers import OTHER_DEVICE, PEERS

# --quick leaves the last one out.
PARTS = ("forward", "backward", "attention", "growth", "memory", "overhead", "startup")
SHARES = {"cases": 0.45, "attention": 0.7, "growth": 0.9, "memory": 0.93}  # of --seconds, from the beginning
GIB = 2**30
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's CPU allocator reads it at its first allocation
CPU_CACHE_BYTES = 64 << 20  # above most last-level caches


@dataclass
class Settings:
    """Everything a part of the benchmark needs to know."""

    device: str
    cases: list[Case]
    peers: list[str]
    peers_given: bool
    rounds: int
    quick: bool
    only: set[str]
    threads: int
    eager_bytes: int  # the broadcast tensor of a peer may be this large
    cache_bytes: int  # a rotation of inputs is larger than this
    length: int | None  # the longest of growth; None: its own
    seconds: float | None = None  # that the run may take: a part starts only within its share of them
    begin: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)  # for want of time

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def ops(self) -> set[str]:
        backward = {"backward", "forward+backward"} if "backward" in self.only else set()
        return backward | ({"forward"} & self.only)

    def left_s(self, part: str) -> float:
        """Seconds that the part may still take."""
        if self.seconds is None:
            return math.inf
        return self.seconds * SHARES.get(part, 1.0) - (time.perf_counter() - self.begin)

    def has_time(self, part: str, what: str) -> bool:
        """Whether there is time to start; if not, the run says so of ``what``."""
        late = self.left_s(part) <= 0
        if late and what not in self.left_out:
            self.left_out.append(what)
        return not late

    def peers_for(self, case: Case) -> list[str]:
        """All that were asked for; by default KeOps and torch.compile only where their compilation pays.

        KeOps compiles for every number of channels and dtype, and takes tens of seconds at length 8192. scikit-learn
        checks every head; on the grid of small ones SciPy stands for both.
        """
        left_out: set[str] = set()
        if not self.peers_given:
            left_out |= {"keops"} if case.group in ("grid", "long") else set()
            left_out |= {"sklearn"} if case.group == "grid" else set()
            left_out |= {"keops", "compile"} if case.dtype == "float64" else set()
        return [name for name in self.peers if name not in left_out]

    def eager_limit(self, case: Case) -> int:
        """Bytes that a peer's broadcast tensor may have; few on the CPU's grid, so that it ends in time."""
        small = case.group == "grid" and not self.cuda
        return min(self.eager_bytes, GIB // 16) if small else self.eager_bytes

    def budget_s(self, case: Case) -> float:
        """Seconds a peer may take on a case before it stops at the fewest rounds."""
        return 0.3 if case.group == "grid" else 1.0 if self.quick else 6.0


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The shapes asked for, or those of the device; `max_terms` is what a slow peer does in a second."""
    cuda = options.device == "cuda"
    max_terms = 2**30 if cuda else 2**24 if options.quick else 2**26
    if options.shapes or options.dtype:
        dtypes = (options.dtype or "float32").split(",")
        return parse(options.shapes or "main,long,grid", dtypes, max_terms, options.quick)
    if options.quick:
        return parse("main,grid", ["float32"], max_terms, True)
    second = ["float16"] if cuda else ["float64"]
    cases = parse("main", ["float32", *second], max_terms, False)
    cases += parse("wide", ["float32", "float16", "bfloat16"], max_terms, False) if cuda else []
    return cases + parse("long,grid", ["float32"], max_terms, False)


def settle(options: argparse.Namespace) -> Settings:
    """Settings from the options; SystemExit where the device is not there."""
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device; it needs a GPU and a torch built for CUDA")
    if options.huge_pages:
        os.environ[HUGE_PAGES] = "1"
    if options.threads:
        torch.set_num_threads(options.threads)
    left_out = OTHER_DEVICE[options.device] | ({"compile", "keops"} if options.quick else set())
    gpu = torch.cuda.get_device_properties(0) if cuda else None
    parts = options.only.split(",") if options.only else PARTS[:-1] if options.quick else PARTS
    return Settings(
        device=options.device,
        cases=choose_cases(options),
        peers=options.peers.split(",") if options.peers else [name for name in PEERS if name not in left_out],
        peers_given=bool(options.peers),
        rounds=options.repeats or (25 if cuda else 5 if options.quick else 9),
        quick=options.quick,
        only={"ring"} if options.ring else set(parts),
        threads=torch.get_num_threads(),
        eager_bytes=gpu.total_memory // 12 if gpu else GIB // 4,
        cache_bytes=getattr(gpu, "L2_cache_size", CPU_CACHE_BYTES),
        length=options.length,
        seconds=options.seconds,
    )


def method(settings: Settings) -> list[str]:
    """The lines that every run opens with."""
    if settings.cuda:
        device, clock = torch.cuda.get_device_name(), "CUDA events; L2 is overwritten before every call"
    else:
        device = report.processor()
        clock = f"wall time, {settings.threads} threads; calls are repeated to 0.1 s a sample"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions().items())
    if settings.only == {"ring"}:
        return [
            f"device    {device}",
            f"versions  {versions}",
            "clock     wall time between barriers, of the slowest process; one call before, not counted",
            "order     all lines in turn, each in new processes; normal inputs; memory in a call of its own",
        ]
    cache, eager = settings.cache_bytes >> 20, settings.eager_bytes / GIB
    return [
        f"device    {device}",
        f"versions  {versions}",
        "term      one |q - k| added to one sum; backward has B*L*S*E for dquery and as many for dkey",
        f"clock     {clock}",
        "warm-up   two calls of each op, the first checked against the float64 formula; one call before each sample",
        f"inputs    normal; 2 to 16 sets in rotation, together beyond {cache} MiB where 16 are enough",
        f"order     all peers and the limit in turn, up to {settings.rounds} rounds, fewer for slow peers",
        "rates     median (min..max) of the rounds; a ratio is the median of the ratios within a round",
        "of limit  rate over the limit's in the same round; by core time: the same per second that",
        "          threads had of a core, which other processes do not disturb (spinning counts as busy)",
        "forward   without gradients; backward: through autograd, after its own forward",
        f"eager     fewer heads where its (B, L, S, E) tensor would pass {eager:.2g} GiB; rates are per term",
        "compile   static shapes",
        *page_method(settings),
        *grid_method(settings),
    ]


def page_method(settings: Settings) -> list[str]:
    """What memory a large result of torch's lies in; the first write to each page costs a fault."""
    if settings.cuda:
        return []
    huge = os.environ.get(HUGE_PAGES) == "1"
    return ["pages     " + ("huge, where the system allows it" if huge else "the system's default; see --huge-pages")]


def grid_method(settings: Settings) -> list[str]:
    """What is different for the original benchmark's shapes; [] if none is timed."""
    cases = [case for case in settings.cases if case.group == "grid"]
    if not cases:
        return []
    terms, gib = max(case.terms("forward") for case in cases), settings.eager_limit(cases[0]) / GIB
    return [
        f"grid      as many of the original 512 x 8 heads as make {terms:.1e} terms forward; eager: fewer, a",
        f"          tensor within {gib:.2g} GiB; compile: once, with dynamic shapes; KeOps, sklearn: left out",
    ]
