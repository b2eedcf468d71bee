"""Fused attention: its time beside other ways to the same result, what causality saves, and decoding."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchlib import report
from benchlib.attention_peers import (
    DOT,
    DOT_CUDNN,
    Function,
    check,
    check_gradients,
    cudnn_dot_product,
    gradients,
    inputs,
    makers,
)
from benchlib.limits import Limits
from benchlib.peers import EPS, OURS, import_ours
from benchlib.settings import Settings
from benchlib.timing import CpuClock, CudaClock, Elapsed

SHAPE, SHAPE_CUDA = (8, 1024, 1024, 64), (16, 2048, 2048, 64)
CAUSAL_SHAPE = (1, 4096, 4096, 64)
DECODE_SHAPES = ((1, 1, 65536, 64), (32, 1, 65536, 64))
LIMIT_SAMPLES = 9
LONGEST_S = 10.0  # of one peer, with the calls that are not counted; at least two rounds


def clock_of(settings: Settings) -> Any:
    """The device's."""
    return CudaClock() if settings.cuda else CpuClock()


def time_interleaved(steps: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[Elapsed]]:
    """Time of each step in every round; all in turn, so that a busy moment hits all alike."""
    clock = clock_of(settings)
    times: dict[str, list[Elapsed]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for turn in range(settings.rounds):
        for name, step in steps.items():
            if turn >= 2 and spent[name] > LONGEST_S:
                continue
            begin = time.perf_counter()
            step()  # not counted, see Entrant.sample
            clock.before_sample()
            clock.before_call()
            start = clock.stamp()
            step()
            times[name].append(clock.between(start, clock.stamp()))
            spent[name] += time.perf_counter() - begin
    return times


def milliseconds(series: Iterable[Elapsed]) -> list[float]:
    """On the wall."""
    return [1e3 * elapsed.wall for elapsed in series]


def step_of(function: Function, arrays: list[Any], backward: bool) -> Callable[[], Any]:
    """One call, without gradients or with all three."""
    if backward:
        return lambda: gradients(function, arrays)
    given = arrays[:3]
    return lambda: function(*given)


def reason(error: Exception) -> str:
    """The first line of its message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def contenders(settings: Settings) -> tuple[dict[str, tuple[Function, list[Any]]], list[list[object]]]:
    """Label -> function and inputs of all whose results are right; lines that say why others are not among them."""
    arrays = inputs(SHAPE_CUDA if settings.cuda else SHAPE, settings.device)
    entries = [(name, name, make, arrays) for name, make in makers(settings.device, settings.peers).items()]
    if settings.cuda:
        halves = [x.bfloat16() for x in arrays]
        again = [entry for entry in entries if entry[0] in (OURS, DOT)] + [(DOT_CUDNN,) * 2 + (cudnn_dot_product, [])]
        entries += [(f"{name}, bfloat16", name, make, halves) for _, name, make, _ in again]
    ready: dict[str, tuple[Function, list[Any]]] = {}
    lines: list[list[object]] = []
    for label, name, make, given in entries:
        try:
            function = make()
            check(name, function, *given[:3])
            check_gradients(name, function, given)
            ready[label] = function, given
        except Exception as error:  # a line that says why, not the end of the run
            lines.append(["-", label, "-", "-", "-", reason(error)])
    return ready, lines


def contest(settings: Settings) -> tuple[list[list[object]], list[dict[str, Any]]]:
    """Lines and records of all contenders, forward and forward + backward."""
    ready, lines = contenders(settings)
    records: list[dict[str, Any]] = [{"op": "-", "peer": str(line[1]), "ms": None, "note": line[-1]} for line in lines]
    for op in ("forward", "forward+backward"):
        steps = {label: step_of(function, given, op != "forward") for label, (function, given) in ready.items()}
        if op == "forward" and OURS in ready:
            l1, given = import_ours(), ready[OURS][1]
            steps["scores alone"] = lambda: l1.l1_scores(*given[:2], eps=EPS)  # noqa: B023  called in this turn only
        for label, step in list(steps.items()):
            try:
                step()
            except Exception as error:
                steps.pop(label)
                lines.append([op, label, "-", "-", "-", reason(error)])
                records.append({"op": op, "peer": label, "ms": None, "note": reason(error)})
        times = time_interleaved(steps, settings)
        for label, series in times.items():
            both = zip(series, times.get(OURS, ()), strict=False)
            ratio = statistics.median([theirs.wall / own.wall for theirs, own in both]) if OURS in times else None
            wall = milliseconds(series)
            median = statistics.median(wall)
            found = {"op": op, "peer": label, "ms": median, "low": min(wall), "high": max(wall)}
            core = 1e3 * statistics.median(elapsed.core for elapsed in series)
            records.append({**found, "core ms": core, "of ours": ratio, "rounds": len(series)})
            spread = report.spread(min(wall), max(wall))
            lines.append([op, label, report.number(median), spread, report.number(ratio, "x"), ""])
    return lines, records


def share_of_limit(settings: Settings, shape: Sequence[int], forward: dict[str, Any]) -> dict[str, float]:
    """What a forward pass makes of the limit of additions; only the terms of its scores count.

    The share is by core time on the CPU, as for the scores.
    """
    limit = Limits(settings).make("forward", "float32")
    samples = [limit.sample() for _ in range(LIMIT_SAMPLES)]  # of 1e9 terms
    wall, core = (statistics.median(times) for times in zip(*samples, strict=True))
    billions = math.prod(shape) / 1e9
    share = 1e3 * billions * core / forward["core ms"] if core else 1e3 * billions * wall / forward["ms"]
    return {"1e9 terms/s": 1e3 * billions / forward["ms"], "limit, 1e9 terms/s": 1 / wall, "share": share}


def decode(settings: Settings) -> list[dict[str, Any]]:
    """One query against many keys: what is read is key and value, once. A copy reads, and writes as much."""
    l1, clock = import_ours(), clock_of(settings)
    records: list[dict[str, Any]] = []
    for shape in DECODE_SHAPES[:1] if settings.quick else DECODE_SHAPES:
        query, key, value, _ = inputs(shape, settings.device)

        def step(given: tuple[Any, Any, Any] = (query, key, value)) -> Any:
            return l1.l1_attention(*given, eps=EPS)

        step()
        before = clock.copy_bandwidth()
        series = milliseconds(time_interleaved({OURS: step}, settings)[OURS])
        copy, median = max(before, clock.copy_bandwidth()), statistics.median(series)
        rate = (key.nbytes + value.nbytes) / median * 1e3
        record = {"shape": shape, "ms": median, "low": min(series), "high": max(series)}
        records.append({**record, "GB/s": rate / 1e9, "copy, GB/s": copy / 1e9, "share": rate / copy})
    return records


def print_decode(records: list[dict[str, Any]]) -> None:
    """The table, and what its shares are of."""
    print("\nAttention of ours, one query, float32: key and value are read once; a copy reads and writes")
    lines = []
    for r in records:
        figures = [report.number(r["ms"]), report.spread(r["low"], r["high"])]
        rates = [report.number(r["GB/s"]), report.number(r["copy, GB/s"]), report.percent(r["share"])]
        lines.append([str(r["shape"]), *figures, *rates, ""])
    print(report.table(["shape", "ms", "min..max", "GB/s", "a copy's", "share", ""], lines), flush=True)


def causal(settings: Settings) -> list[list[object]]:
    """Full against causal, of ours."""
    l1, arrays = import_ours(), inputs(CAUSAL_SHAPE, settings.device)
    lines: list[list[object]] = []
    for op in ("forward", "forward+backward"):
        kinds: dict[str, Function] = {
            "full": lambda q, k, v: l1.l1_attention(q, k, v, eps=EPS),
            "causal": lambda q, k, v: l1.l1_attention(q, k, v, is_causal=True, eps=EPS),
        }
        steps = {name: step_of(function, arrays, op != "forward") for name, function in kinds.items()}
        for step in steps.values():
            step()
        times = {name: milliseconds(series) for name, series in time_interleaved(steps, settings).items()}
        ratio = statistics.median([a / b for a, b in zip(times["full"], times["causal"], strict=True)])
        medians = [report.number(statistics.median(times[name])) for name in steps]
        lines.append([op, *medians, report.number(ratio, "x"), ""])
    return lines


def attention(settings: Settings) -> dict[str, Any]:
    """Print all of it; the figures as a dictionary."""
    lines, records = contest(settings)
    shape = SHAPE_CUDA if settings.cuda else SHAPE
    print(f"\nAttention, {shape} float32: softmax(1 / (eps + distance)) @ value; dot product: torch's SDPA")
    print(report.table(["op", "peer", "ms", "min..max", "of ours", "note"], lines), flush=True)
    forward = [r for r in records if (r["op"], r["peer"]) == ("forward", OURS) and r["ms"]]
    share = share_of_limit(settings, shape, forward[0]) if forward else {}
    if share:
        print("Forward of ours, terms of the scores: " + ", ".join(f"{name} {x:.3g}" for name, x in share.items()))
    decoded = decode(settings)
    print_decode(decoded)
    saved = causal(settings)
    print(f"\nAttention of ours, {CAUSAL_SHAPE} float32, ms")
    print(report.table(["op", "full", "causal", "faster by", ""], saved), flush=True)
    return {"shape": shape, "contest": records, "share": share, "decode": decoded, "causal": saved}
