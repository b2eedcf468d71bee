"""Measurements that need a process of their own; each prints one line of JSON.

python -m benchlib.probe import
python -m benchlib.probe first-call --device cpu
python -m benchlib.probe overhead   --device cpu --peer ours
python -m benchlib.probe memory     --device cpu --peer ours --op backward --length 8192
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
CACHE_VARIABLES = ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")


def in_fresh_process(*arguments: str, caches: str | None = None) -> dict[str, Any]:
    """Run this module with `arguments`; with `caches`, all caches of compiled code lie in that folder."""
    environment = dict(os.environ)
    scripts = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH", ""))))
    if caches is not None:
        environment.update({name: os.path.join(caches, name.lower()) for name in CACHE_VARIABLES})
    command = [sys.executable, "-m", "benchlib.probe", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": last[:160]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def probe_import(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `import l1attn_cupy`, and which heavy packages it pulled in."""
    start = time.perf_counter()
    import l1attn_cupy  # noqa: F401

    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "pulled_in": [name for name in ("numba", "torch", "cupy") if name in sys.modules],
    }


def inputs(options: argparse.Namespace, batch: int, length: int, channels: int) -> tuple[Any, Any, Any]:
    import torch

    def normal(*size: int) -> Any:
        return torch.randn(size, device=options.device, dtype=getattr(torch, options.dtype))

    return normal(batch, length, channels), normal(batch, length, channels), normal(batch, length, length)


def waiter(device: str) -> Callable[[], None]:
    """A function that returns when everything queued on the device is done."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peer_of(options: argparse.Namespace, length: int, channels: int) -> Any:
    from benchlib.cases import Case
    from benchlib.peers import PEERS

    return PEERS[options.peer](Case("user", 1, length, length, channels, options.dtype), options.device)


def probe_first_call(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a process's first forward, of its first forward + backward, and of its second."""
    import torch

    q, k, g = inputs(options, 8, 128, 64)
    peer, wait = peer_of(options, 128, 64), waiter(options.device)
    wait()

    def timed(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start

    def step() -> None:
        torch.autograd.grad(peer.scores(q, k), (q, k), g)

    forward = timed(lambda: peer.scores(q, k))
    q.requires_grad_()
    k.requires_grad_()
    return {"forward": forward, "forward_backward": timed(step), "again": timed(step)}


def empty_op(device: str) -> Callable[[Any, Any], Any]:
    """A registered op under an autograd Function that only allocates: what any torch op costs at least."""
    import torch

    library = torch.library.Library("l1attn_bench", "DEF")
    library.define("empty(Tensor query, Tensor key) -> Tensor")
    library.impl("empty", lambda q, k: q.new_empty((*q.shape[:-1], k.shape[-2])), "CompositeExplicitAutograd")

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any) -> Any:
            ctx.save_for_backward(q, k)
            return torch.ops.l1attn_bench.empty(q, k)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            q, k = ctx.saved_tensors
            return torch.empty_like(q), torch.empty_like(k)

    def call(q: Any, k: Any) -> Any:
        assert library is not None  # an op lives as long as its Library
        return Empty.apply(q, k)

    return call


def call_of(options: argparse.Namespace) -> Callable[[Any, Any], Any]:
    """A function of query and key whose result has the shape of the scores, and of query."""
    if options.peer == "empty":
        return empty_op(options.device)
    if options.peer == "attention":
        import l1attn_cupy as l1

        return lambda q, k: l1.l1_attention(q, k, k)
    return peer_of(options, 16, 16).scores


def probe_overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds a call on (1, 16, 16, 16) keeps the host busy; on a GPU nothing is waited for.

    On one CPU thread: waiting for others would be timed along with the peers that start them.
    """
    import torch

    torch.set_num_threads(1)
    q, k, g = (x.unsqueeze(0) for x in inputs(options, 16, 16, 16))
    scores = call_of(options)
    wait = waiter(options.device)

    def step() -> None:
        torch.autograd.grad(scores(q, k), (q, k), g)

    def median_us(function: Callable[[], Any]) -> float:
        times = []
        for call in range(options.calls + 20):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
            if call % 50 == 0:
                wait()
        return 1e6 * statistics.median(times[20:])

    with torch.no_grad():
        forward = median_us(lambda: scores(q, k))
    q.requires_grad_()
    k.requires_grad_()
    keeping = median_us(lambda: scores(q, k))
    return {"forward": forward, "forward_grad": keeping, "forward_backward": median_us(step)}


def resident_peak() -> int:
    """Highest resident set so far, bytes: VmHWM where /proc has it, else getrusage."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def lower_resident_peak() -> bool:
    """Give free memory back and set VmHWM to what is resident now; False where this is barred."""
    import l1attn_cupy as l1

    l1.free_all_blocks()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_of(function: Callable[[], Any], device: str) -> tuple[int, Any]:
    """(bytes above what was held before, the function's result), on the device's memory."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    lower_resident_peak()
    before = resident_peak()
    result = function()
    return resident_peak() - before, result


def probe_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak MiB of a call beyond its inputs, and that less its outputs; compiled before, on smaller inputs.

    These are of as many batch entries, and work for several threads: other kernels are for one thread, and for many
    entries.
    """
    import torch

    peer = peer_of(options, options.length, options.channels)

    def run(q: Any, k: Any, g: Any) -> tuple[int, list[Any]]:
        if options.op == "forward":
            peak, out = peak_of(lambda: peer.scores(q, k), options.device)
            return peak, [out]
        q.requires_grad_()
        k.requires_grad_()
        out = peer.scores(q, k)
        peak, grads = peak_of(lambda: torch.autograd.grad(out, (q, k), g), options.device)
        return peak, list(grads)

    for _ in range(2):
        run(*inputs(options, 1, 512, options.channels))
    peak, outputs = run(*inputs(options, 1, options.length, options.channels))
    size = sum(t.numel() * t.element_size() for t in outputs)
    return {"peak_mib": peak / MIB, "outputs_mib": size / MIB, "extra_mib": (peak - size) / MIB}


PROBES = {
    "import": probe_import,
    "first-call": probe_first_call,
    "overhead": probe_overhead,
    "memory": probe_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchlib.probe", description=__doc__)
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peer", default="ours")
    parser.add_argument("--op", default="forward", choices=("forward", "backward"))
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    print(json.dumps(PROBES[options.probe](options)))


if __name__ == "__main__":
    main()
