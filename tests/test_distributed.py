"""Several processes: what `distributed_cases` finds in worlds of two and of four, and plans of rings without any."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child import ROOT
from test_package import readme_examples

import l1attn_cupy as l1
from l1attn_cupy import plan_ring
from l1attn_cupy.plan_ring import RingPlan

distributed_cases = pytest.importorskip("distributed_cases", reason="this torch is without torch.distributed")

#: Seconds after which processes are ended, so that nothing waits for ever.
LIMIT_S = 240

#: In the world of two these come last.
LOSSES = [name for name in distributed_cases.CASES if name.startswith("peer")]
TOGETHER = [name for name in distributed_cases.CASES if name not in LOSSES]


def environment() -> dict[str, str]:
    """Of processes that share the cores: one thread each, and they find each other without a network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }


def run_world(folder: Path, size: int, *cases: str, backend: str = "gloo") -> list[dict[str, str]]:
    """What each rank tells of each case; all processes have ended."""
    command = [sys.executable, str(Path(distributed_cases.__file__)), "RANK", str(size), str(folder), backend, *cases]
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command[2] = str(rank)
            with log.open("w") as file:
                started = subprocess.Popen(
                    command, env=environment(), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, text=True
                )
            processes.append(started)
        for process in processes:
            process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        pass  # the cases that are missing tell
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [folder / f"rank{rank}.json" for rank in range(size)]
    return [
        {**(json.loads(result.read_text()) if result.exists() else {}), "log": log.read_text()[-3000:]}
        for result, log in zip(results, logs, strict=True)
    ]


@pytest.fixture(scope="module")
def compiled():
    """All that the cases need is in the cache: no process waits for others that compile."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 9, 5, dtype=dtype).requires_grad_()
        mask = torch.randn(9, 9, dtype=dtype).requires_grad_()
        l1.l1_attention(x, x, x, mask).sum().backward()
        l1.l1_scores(x, x).sum().backward()


@pytest.fixture(scope="module")
def worlds(compiled, tmp_path_factory):
    """Starts each world when it is first asked for."""
    found: dict[int, list[dict[str, str]]] = {}

    def world(size: int) -> list[dict[str, str]]:
        if size not in found:
            found[size] = run_world(
                tmp_path_factory.mktemp(f"world{size}"), size, *TOGETHER, *(LOSSES if size == 2 else ())
            )
        return found[size]

    return world


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", TOGETHER)
def test_distributed(worlds, case, size):
    told = worlds(size)
    for rank, one in enumerate(told):
        assert one.get(case) == "ok", f"rank {rank}: {one.get(case, 'not run')}\n{one['log']}"


@pytest.mark.slow
@pytest.mark.parametrize("case", LOSSES)
def test_distributed_error_within_the_timeout(worlds, case):
    """Of rank 0, whose peer is the one that is lost; it would wait far beyond the limit of this test."""
    told = worlds(2)[0]
    assert told.get(case) == "ok", f"{told.get(case, 'not run')}\n{told['log']}"


@pytest.mark.gpu
@pytest.mark.slow
def test_distributed_on_gpus(tmp_path):
    """The same between GPUs, by NCCL."""
    size = min(4, torch.cuda.device_count())
    if size < 2:
        pytest.skip("a ring of GPUs needs two of them")
    for rank, told in enumerate(run_world(tmp_path, size, *distributed_cases.ON_GPUS, backend="nccl")):
        for case in distributed_cases.ON_GPUS:
            assert told.get(case) == "ok", f"rank {rank}, {case}: {told.get(case, 'not run')}\n{told['log']}"


@pytest.mark.slow
@pytest.mark.parametrize("example", [example for example in readme_examples() if "torchrun" in example])
def test_readme_example_of_several_processes(compiled, example, tmp_path):
    """Started as it says.

    Once in some fifty starts a process aborts while its interpreter ends, probably as in pytorch/pytorch#179291, where
    a thread of Gloo lets go of a tensor too late. Where both had come to the end of the example, it is started again.
    """
    (tmp_path / "ring.py").write_text(example + "print('the end', flush=True)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ring.py"]
    for _ in range(2):
        done = subprocess.run(
            command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.stdout.count("the end") == 2, done.stdout + done.stderr
        if done.returncode == 0:
            return
        assert "terminate called without an active exception" in done.stderr, done.stderr
    pytest.fail(f"twice:\n{done.stderr}")


def test_ring_needs_a_process_group():
    from l1attn_cupy.distributed import ring_l1_attention, zigzag_shard, zigzag_unshard

    x = torch.zeros(2, 3, 4)
    for call, given in ((ring_l1_attention, (x, x, x)), (zigzag_shard, (x,)), (zigzag_unshard, (x,))):
        with pytest.raises(ValueError, match="group must be an initialised process group, got None before"):
            call(*given)


@pytest.mark.parametrize(
    ("device", "backends"), [("cpu", "cuda:nccl"), ("cuda", "cpu:gloo,cuda:gloo"), ("cuda", "cpu:gloo")]
)
def test_ring_needs_a_backend_for_the_device(device, backends):
    with pytest.raises(
        ValueError, match=f"group must have a backend that sends tensors on {device} .*, got {backends}"
    ):
        plan_ring.check_backend(device, backends)
    plan_ring.check_backend(device, "cpu:gloo,cuda:nccl")


def test_register_dtensor_on_another_torch(monkeypatch):
    """It alone needs what not every torch has; what it needs is looked up before anything is registered."""
    from torch.distributed.tensor import DTensor, experimental

    from l1attn_cupy.distributed import dtensor

    again = importlib.util.spec_from_file_location("l1attn_cupy.distributed.again", dtensor.__file__)
    module = importlib.util.module_from_spec(again)
    with monkeypatch.context() as patch:
        patch.delattr(experimental, "register_sharding")
        again.loader.exec_module(module)
        with pytest.raises(ImportError, match=r"register_dtensor needs a torch with .*register_sharding"):
            module.register_dtensor()
    with monkeypatch.context() as patch:
        patch.delattr(DTensor, "_op_dispatcher")
        with pytest.raises(ImportError, match=r"register_dtensor needs .* '_op_dispatcher'"):
            module.register_dtensor()


LAYOUTS = [
    (False, (5, 0, 9, 3), (2, 7, 1, 4)),
    (False, (6,), (6,)),
    (True, (5, 6, 6), (5, 6, 6)),
    (True, (5, 6, 6), (3, 3, 4)),
]


@pytest.mark.parametrize("band", [(-1, -1), (-1, 0), (3, 2), (0, 0), (0, 11), (11, 0), (-1, 2), (2, -1)])
@pytest.mark.parametrize(("zigzag", "lengths_q", "lengths_k"), LAYOUTS)
def test_ring_blocks_cover_the_band_once(zigzag, lengths_q, lengths_k, band):
    """Each pair of a query and a key within the band is in one block of one step of one rank, and no other pair is."""
    counted = torch.zeros(sum(lengths_q), sum(lengths_k), dtype=torch.int64)
    size = len(lengths_q)
    for rank in range(size):
        plan = RingPlan(rank, size, lengths_q, lengths_k, band, zigzag)
        rows = places(lengths_q, rank, zigzag)
        for step in range(size):
            columns = places(lengths_k, plan.source(step), zigzag)
            for block in plan.blocks(step):
                i = torch.arange(block.end_q - block.first_q).unsqueeze(1)
                j = torch.arange(block.end_k - block.first_k)
                left, right = block.window
                within = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
                at = rows[block.first_q : block.end_q].unsqueeze(1), columns[block.first_k : block.end_k]
                counted[at] += within.long()
                assert within.any(0).all()
                assert within.any(1).all()
    i, j = torch.arange(sum(lengths_q)).unsqueeze(1), torch.arange(sum(lengths_k))
    wanted = ((band[0] < 0) | (j >= i - band[0])) & ((band[1] < 0) | (j <= i + band[1]))
    assert counted.equal(wanted.long())


def places(lengths, rank, zigzag):
    """Where the rows of a shard are in the sequence."""
    return torch.cat([torch.arange(s.start, s.start + s.length) for s in plan_ring.spans(lengths, rank, zigzag)])


def test_ring_zigzag_shares_out_causal_work():
    """Every rank has as many pairs in all, and in each step but the first as many as all others."""
    size, length = 4, 48
    work = {zigzag: [] for zigzag in (False, True)}
    for zigzag, ranks in work.items():
        for rank in range(size):
            plan = RingPlan(rank, size, (length,) * size, (length,) * size, (-1, 0), zigzag)
            ranks.append([sum(pairs(block) for block in plan.blocks(step)) for step in range(size)])
    assert len({tuple(steps) for steps in work[True]}) == 1
    assert len({sum(steps) for steps in work[False]}) == size
    assert sum(map(sum, work[True])) == sum(map(sum, work[False]))


def pairs(block):
    """Of a block that is causal, or without a window."""
    rows, columns = block.end_q - block.first_q, block.end_k - block.first_k
    if block.window == (-1, -1):
        return rows * columns
    assert block.window == (-1, 0)
    assert rows == columns
    return rows * (rows + 1) // 2


def test_ring_few_blocks():
    """Causal with zigzag takes one call in each step: causal, or half of the keys, or half of the queries."""
    for rank in range(4):
        plan = RingPlan(rank, 4, (10,) * 4, (10,) * 4, (-1, 0), True)
        assert [len(plan.blocks(step)) for step in range(4)] == [1, 1, 1, 1]
        plan = plan._replace(band=(-1, -1))
        assert [len(plan.blocks(step)) for step in range(4)] == [1, 1, 1, 1]
