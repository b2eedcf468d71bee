"""Ring attention: time and peak memory of each process, beside one process that has all of it.

python -m benchlib.ring RANK SIZE FOLDER --device cpu --layout zigzag --length 8192
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchlib import report
from benchlib.peers import EPS, import_ours
from benchlib.probe import MIB, peak_of, waiter
from benchlib.settings import Settings

HEADS, CHANNELS = 4, 64
LENGTH, LENGTH_QUICK, LENGTH_CUDA = 4096, 2048, 65536
OPS = ("forward", "forward+backward")
PASSES = 2
LIMIT_S = 300


class World(NamedTuple):
    """Processes of a measurement; ``layout`` is how the sequence is cut, "one process" if it is not."""

    size: int
    threads: int
    layout: str


def worlds(settings: Settings) -> list[World]:
    """One process, on one thread and on all; as many processes as there are cores or devices, and twice as many."""
    cores = settings.threads
    if settings.cuda:
        sizes = [size for size in (2, 4, 8) if size <= torch.cuda.device_count()]
        return [World(1, 1, "one process"), *(World(size, 1, "zigzag") for size in sizes)]
    alone = [World(1, threads, "one process") for threads in sorted({1, cores})]
    size = max(2, cores)
    return [*alone, World(size, 1, "contiguous"), World(size, 1, "zigzag"), World(2 * size, 1, "zigzag")]


def ring(settings: Settings) -> list[dict[str, Any]]:
    """Print the table; the figures as records."""
    length = LENGTH_CUDA if settings.cuda else LENGTH_QUICK if settings.quick else LENGTH
    every, rounds = worlds(settings), 2 if settings.quick else 3
    found: dict[World, list[dict[str, Any]]] = {world: [] for world in every}
    for _ in range(1 if settings.quick else PASSES):  # in turn, so that a busy minute does not hit one alone
        for world in every:
            found[world].append(run_world(world, settings.device, length, rounds))
    print(f"\nRing attention, ({HEADS}, {length}, {length}, {CHANNELS}) float32, causal. One process: l1_attention.")
    print("ms and min..max: of the slowest process; core ms: that all processes together had of cores, which others on")
    print(
        "the machine disturb less. MiB: of the process that needs most, inputs and the peak beyond, results included."
    )
    records = [summary(world, op, found[world]) for op in OPS for world in every]
    header = ["op", "processes", "threads", "ms", "min..max", "core ms", "of one", "inputs", "beyond", "note"]
    print(report.table(header, lines(records)))
    if not settings.cuda and every[-1].size > settings.threads:
        print(f"{every[-1].size} processes share {settings.threads} cores: that shows memory, and what turns cost.")
    if settings.cuda and len(every) == 1:
        print("One CUDA device is here: a ring needs more.")
    sys.stdout.flush()
    return records


def lines(records: list[dict[str, Any]]) -> list[list[object]]:
    """The table's, with core time relative to that of one thread of one process."""
    base = {record["op"]: record.get("core_ms") for record in reversed(records) if record["size"] == 1}
    shown = []
    for record in records:
        core, one = record.get("core_ms"), base.get(record["op"])
        ratio = core / one if core and one else None
        who = record["layout"] if record["size"] == 1 else f"{record['size']}, {record['layout']}"
        spread = report.spread(record.get("low"), record.get("high"))
        figures = [report.number(record.get(key)) for key in ("inputs_mib", "beyond_mib")]
        times = [report.number(record.get("ms")), spread, report.number(core), report.number(ratio, "x")]
        shown.append([record["op"], who, record["threads"], *times, *figures, record.get("error", "")])
    return shown


def summary(world: World, op: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What all runs of a world say of an op."""
    record: dict[str, Any] = {"op": op, **world._asdict()}
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return {**record, "error": errors[0]}
    times = [ms for run in runs for ms in run[op]["ms"]]
    return {
        **record,
        "ms": statistics.median(times),
        "low": min(times),
        "high": max(times),
        "rounds": len(times),
        "core_ms": statistics.median(ms for run in runs for ms in run[op]["core_ms"]) or None,
        "inputs_mib": runs[0]["inputs_mib"],
        "beyond_mib": statistics.median(run[op]["beyond_mib"] for run in runs),
    }


def run_world(world: World, device: str, length: int, rounds: int) -> dict[str, Any]:
    """What rank 0 prints; all processes have ended."""
    scripts = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(world.threads)}
    options = ["--device", device, "--layout", world.layout, "--length", str(length), "--rounds", str(rounds)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchlib.ring", str(rank), str(world.size), folder, *options],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world.size)
        ]
        try:
            printed = [process.communicate(timeout=LIMIT_S) for process in processes]
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {LIMIT_S} s"}
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        if process.returncode != 0:
            return {"error": (errors.strip().splitlines() or ["no message"])[-1][:160]}
    result: dict[str, Any] = json.loads(printed[0][0].strip().splitlines()[-1])
    return result


def measure(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Times and peaks of this process's part, the largest of all ranks."""
    l1 = import_ours()
    from l1attn_cupy.distributed import ring_l1_attention

    alone, wait = options.layout == "one process", waiter(options.device)
    length = options.length // options.size
    given = [torch.randn(HEADS, length, CHANNELS, device=device) for _ in range(4)]

    def forward(backward: bool) -> Any:
        leaves = [x.detach().requires_grad_(backward) for x in given[:3]]
        if alone:
            return l1.l1_attention(*leaves, is_causal=True, eps=EPS), leaves
        more = {"zigzag": options.layout == "zigzag", "is_causal": True, "eps": EPS}
        return ring_l1_attention(*leaves, **more), leaves

    def step(op: str) -> Any:
        out, leaves = forward(op != "forward")
        return out if op == "forward" else (out, *torch.autograd.grad(out, leaves, given[3]))

    result: dict[str, Any] = {"inputs_mib": sum(x.nbytes for x in given[:3]) / MIB}
    for op in OPS:
        step(op)  # compiles, and starts threads
        times, core = [], []
        for _ in range(options.rounds):
            wait()
            dist.barrier()
            start, start_core = time.perf_counter(), time.process_time()
            step(op)
            wait()
            times.append(1e3 * (time.perf_counter() - start))
            core.append(1e3 * (time.process_time() - start_core) if device == "cpu" else 0.0)
        dist.barrier()
        peak, _ = peak_of(functools.partial(step, op), options.device)
        *times, beyond = reduced([*times, peak / MIB], dist.ReduceOp.MAX, device)
        result[op] = {"ms": times, "core_ms": reduced(core, dist.ReduceOp.SUM, device), "beyond_mib": beyond}
    return result


def reduced(numbers: list[float], how: Any, device: str) -> list[float]:
    """The largest, or the sum, of each number on all ranks."""
    everything = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(everything, how)
    found: list[float] = everything.tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchlib.ring", description=__doc__)
    parser.add_argument("rank", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layout", required=True, choices=("one process", "contiguous", "zigzag"))
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cpu"
    if options.device == "cuda":
        torch.cuda.set_device(options.rank)
        device = f"cuda:{options.rank}"
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        store=dist.FileStore(str(options.folder / "store"), options.size),
        rank=options.rank,
        world_size=options.size,
        timeout=datetime.timedelta(seconds=LIMIT_S),
    )
    result = measure(options, device)
    if options.rank == 0:
        print(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
