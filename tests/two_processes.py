"""One of two processes that train a model of L1 attention together: ``python two_processes.py RANK FILE``.

Prints a line for each way of training whose parameters come out as those of one process with the whole batch.
"""

from __future__ import annotations

import datetime
import sys

import torch
from torch import distributed

import l1attn_cupy as l1


class Model(torch.nn.Module):
    """Attention, and what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = l1.L1MultiheadAttention(12, 3, batch_first=True)
        self.out = torch.nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.attention(x, x, x, need_weights=False, is_causal=True)[0])


def train(model: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return model


def compare(name: str, model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for ours, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(getattr(ours, "full_tensor", lambda x=ours: x)(), wanted)
    start = dict(Model().named_parameters())
    assert all((x != start[name]).any() for name, x in expected.named_parameters())
    print(name, flush=True)


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timeout)
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(1))
    expected, part = train(Model(), x), x[2 * rank : 2 * rank + 2]
    compare("DDP", train(torch.nn.parallel.DistributedDataParallel(Model()), part), expected)
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        print("no FSDP2", flush=True)
    else:
        model, mesh = Model(), distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model.attention, mesh=mesh)
        fully_shard(model, mesh=mesh)
        compare("FSDP2", train(model, part), expected)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
