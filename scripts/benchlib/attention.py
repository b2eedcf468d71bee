"""Fused attention: its time beside other ways to the same result, what causality saves, and its memory."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchlib import report
from benchlib.limit_cuda import CudaLimit
from benchlib.peers import EPS, OURS, Unavailable, import_ours, with_inductor
from benchlib.probe import in_fresh_process
from benchlib.settings import Settings
from benchlib.timing import CpuClock, CudaClock
from benchlib.verify import WrongResult

SHAPE, SHAPE_CUDA = (8, 1024, 1024, 64), (16, 2048, 2048, 64)
CAUSAL_SHAPE = (1, 4096, 4096, 64)
DECODE_SHAPES = ((1, 1, 65536, 64), (32, 1, 65536, 64))
LIMIT_SAMPLES = 9
LONGEST_S = 20.0  # of one peer; at least two rounds

DOT, DOT_CUDNN = "dot product", "dot product by cuDNN"

Function = Callable[[Any, Any, Any], Any]


def naive(query: Any, key: Any, value: Any) -> Any:
    """The formula by broadcasting, for torch.compile."""
    distance = (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1)
    return torch.softmax(1.0 / (EPS + distance), -1) @ value


def cdist(query: Any, key: Any, value: Any) -> Any:
    """A few heads at a time: on a GPU torch.cdist ends in an illegal memory access from 2**31 terms on."""
    heads = max(1, (2**31 - 1) // (query.shape[-2] * key.shape[-2] * key.shape[-1]))
    parts = zip(query.split(heads), key.split(heads), value.split(heads), strict=True)
    return torch.cat([torch.softmax(1.0 / (EPS + torch.cdist(q, k, p=1.0)), -1) @ v for q, k, v in parts])


def keops() -> Function:
    """KeOps' own fused softmax and weighted sum."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import pykeops
            from pykeops.torch import LazyTensor
    except Exception as error:
        raise Unavailable(f"KeOps: {error}; pip install 'l1attn_cupy[bench]', it needs a C++ compiler") from error
    pykeops.set_verbose(False)

    def function(query: Any, key: Any, value: Any) -> Any:
        lazy_q, lazy_k = LazyTensor(query[..., :, None, :]), LazyTensor(key[..., None, :, :])
        scores = 1.0 / ((lazy_q - lazy_k).abs().sum(-1) + EPS)
        return scores.sumsoftmaxweight(LazyTensor(value[..., None, :, :]), dim=query.ndim - 1)

    return function


def dot_product(*backends: Any) -> Function:
    """torch's own attention; heads in a dimension of their own, as its fused kernels take nothing else.

    It chooses among its kernels by itself, or among ``backends``.
    """

    def function(query: Any, key: Any, value: Any) -> Any:
        chosen = sdpa_kernel(list(backends)) if backends else contextlib.nullcontext()
        with chosen:
            return torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None])[0]

    return function


def makers(settings: Settings) -> dict[str, Callable[[], Function]]:
    """The contenders among the peers asked for; dot-product attention is not one, but what L1 costs more than."""
    l1 = import_ours()
    found: dict[str, Callable[[], Function]] = {
        OURS: lambda: lambda q, k, v: l1.l1_attention(q, k, v, eps=EPS),
        "cdist": lambda: cdist,
        "compile": lambda: with_inductor(naive, settings.device),
        "keops": keops,
    }
    chosen = {name: make for name, make in found.items() if name in settings.peers}
    return chosen | {DOT: dot_product}


def inputs(shape: tuple[int, int, int, int], device: str) -> list[Any]:
    """Query, key, value and a gradient of the result, normal."""
    batch, length_q, length_k, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, length, channels, generator=generator, device=device)
        for length in (length_q, length_k, length_k, length_q)
    ]


def check(function: Function, query: Any, key: Any, value: Any) -> None:
    """Raise WrongResult unless some rows of the first head are those of the formula in float64."""
    q, k, v = query[0, :16].double(), key[0].double(), value[0].double()
    scores = torch.stack([1.0 / (EPS + (row - k).abs().sum(-1)) for row in q])
    weights = torch.softmax(scores, -1)
    error = ((function(query, key, value)[0, :16] - weights @ v).abs() / (weights @ v.abs())).max().item()
    # A sum of E channels, F, the exponent of a score of this size, and a sum of S weights.
    eps = torch.finfo(torch.float32).eps
    bound = 2 * eps * ((query.shape[-1] + 4) * scores.max().item() + key.shape[-2] + 16)
    if not error <= bound:
        raise WrongResult(f"off by {error:.1e}, bound {bound:.1e}")


def clock_of(settings: Settings) -> Any:
    """The device's."""
    return CudaClock() if settings.cuda else CpuClock()


def time_interleaved(steps: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Milliseconds of each step in every round; all in turn, so that a busy moment hits all alike."""
    clock = clock_of(settings)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(settings.rounds):
        for name, step in steps.items():
            if turn >= 2 and sum(times[name]) > 1e3 * LONGEST_S:
                continue
            step()  # not counted, see Entrant.sample
            clock.before_sample()
            clock.before_call()
            start = clock.stamp()
            step()
            times[name].append(1e3 * clock.between(start, clock.stamp()).wall)
    return times


def step_of(function: Function, arrays: list[Any], backward: bool) -> Callable[[], Any]:
    """One call, without gradients or with all three."""
    *given, grad = arrays
    leaves = [x.detach().requires_grad_(backward) for x in given]
    if backward:
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)
    return lambda: function(*leaves)


def contest(settings: Settings) -> tuple[list[list[object]], list[dict[str, Any]]]:
    """Lines and records of all contenders, forward and forward + backward."""
    arrays = inputs(SHAPE_CUDA if settings.cuda else SHAPE, settings.device)
    functions: dict[str, Function] = {}
    lines: list[list[object]] = []
    for name, make in makers(settings).items():
        try:
            functions[name] = make()
            if name != DOT:
                check(functions[name], *arrays[:3])
        except Exception as error:  # a line that says why, not the end of the run
            functions.pop(name, None)
            lines.append(["-", name, "-", "-", "-", str(error).strip().splitlines()[0][:120]])
    records, l1 = [], import_ours()
    for op in ("forward", "forward+backward"):
        steps = {name: step_of(function, arrays, op != "forward") for name, function in functions.items()}
        if op == "forward" and OURS in functions:
            steps["scores alone"] = lambda: l1.l1_scores(*arrays[:2], eps=EPS)
        if settings.cuda:
            halves = [x.bfloat16() for x in arrays]
            known = functions | {DOT_CUDNN: dot_product(SDPBackend.CUDNN_ATTENTION)}  # which takes 16-bit inputs only
            for name in sorted({OURS, DOT, DOT_CUDNN} & known.keys()):
                steps[f"{name}, bfloat16"] = step_of(known[name], halves, op != "forward")
        for name, step in list(steps.items()):
            try:
                step()
            except Exception as error:
                steps.pop(name)
                lines.append([op, name, "-", "-", "-", str(error).strip().splitlines()[0][:120]])
        times = time_interleaved(steps, settings)
        for name, series in times.items():
            both = zip(series, times.get(OURS, ()), strict=False)
            ratio = statistics.median([theirs / own for theirs, own in both]) if OURS in times else None
            median = statistics.median(series)
            spread = report.spread(min(series), max(series))
            lines.append([op, name, report.number(median), spread, report.number(ratio, "x"), ""])
            records.append({"op": op, "peer": name, "ms": median, "of ours": ratio, "rounds": len(series)})
    return lines, records


def share_of_limit(milliseconds: float) -> dict[str, float]:
    """What a forward pass makes of the limit of additions; only the terms of its scores count."""
    limit = CudaLimit("forward", "float32")
    fastest = 1 / statistics.median(limit.sample().wall for _ in range(LIMIT_SAMPLES))  # 1e9 terms/s
    terms = math.prod(SHAPE_CUDA) / milliseconds / 1e6
    return {"1e9 terms/s": terms, "limit, 1e9 terms/s": fastest, "share": terms / fastest}


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
        series = time_interleaved({OURS: step}, settings)[OURS]
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
        times = time_interleaved(steps, settings)
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
    forward = [record["ms"] for record in records if (record["op"], record["peer"]) == ("forward", OURS)]
    share = share_of_limit(forward[0]) if settings.cuda and forward else {}
    if share:
        print("Forward of ours, terms of the scores: " + ", ".join(f"{name} {x:.3g}" for name, x in share.items()))
    decoded = decode(settings)
    print_decode(decoded)
    saved = causal(settings)
    print(f"\nAttention of ours, {CAUSAL_SHAPE} float32, ms")
    print(report.table(["op", "full", "causal", "faster by", ""], saved), flush=True)
    length = 8192 if settings.quick else 65536
    options = ("--device", settings.device, "--length", str(length))
    memory = {op: in_fresh_process("attention-memory", "--op", op, *options) for op in ("forward", "backward")}
    print(f"\nAttention of ours, (1, {length}, {length}, 64) float32, MiB; beyond: neither inputs nor outputs")
    table = []
    for op, found in memory.items():
        figures = [report.number(found.get(key)) for key in ("peak_mib", "outputs_mib", "extra_mib", "seconds")]
        table.append([op, *figures, found.get("error", f"the matrix of scores would be {length**2 / 2**18:.0f} MiB")])
    print(report.table(["op", "added", "outputs", "beyond", "seconds", "note"], table), flush=True)
    return {"shape": shape, "contest": records, "share": share, "decode": decoded, "causal": saved, "memory": memory}
