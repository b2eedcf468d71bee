"""Cutting sequences into shards that are as much work for every rank where attention is causal, and joining them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .. import arrays, autograd, plan, plan_ring
from ..plan_ring import Told
from .groups import Group


def zigzag_shard(tensor: torch.Tensor, *, group: Any | None = None, dim: int = -2) -> torch.Tensor:
    """This rank's shard of a whole sequence, for ``ring_l1_attention(zigzag=True)``.

    The sequence is cut into two even chunks for each rank; each rank gets one from either end. Of 3 ranks::

        chunk   0   1   2   3   4   5
        rank    0   1   2   2   1   0

    Parameters
    ----------
    tensor : torch.Tensor
        The same on every rank: query, key or value, tokens, or places ``torch.arange(length)`` for what depends on
        them. Where the length is not a multiple of the chunks, the first ones have a row more.
    group : torch.distributed.ProcessGroup, optional
        By default all processes.
    dim : int
        The dimension that is the sequence.

    Returns
    -------
    torch.Tensor
        New memory; differentiable.

    Raises
    ------
    TypeError, ValueError
        There is no process group, this process is not in it, or ``dim`` is not a dimension.
    """
    ring = Group(group)
    plan_ring.check_tensor("tensor", isinstance(tensor, torch.Tensor), isinstance(tensor, DTensor), tensor, whole=True)
    dim = plan_ring.check_dim(dim, tensor.dim())
    parts = tensor.split(plan_ring.chunks(tensor.shape[dim], 2 * ring.size), dim)
    return torch.cat([parts[ring.rank], parts[-1 - ring.rank]], dim)


def zigzag_unshard(shard: torch.Tensor, *, group: Any | None = None, dim: int = -2) -> torch.Tensor:
    """The whole sequence, on every rank, from the shards of all; undoes `zigzag_shard`.

    Parameters
    ----------
    shard : torch.Tensor
        This rank's; without a gradient.
    group, dim
        As in `zigzag_shard`.

    Returns
    -------
    torch.Tensor

    Raises
    ------
    TypeError, ValueError
        As `zigzag_shard`; also where shards do not fit together, hold no data, or a gradient would be lost. An error of
        one rank is one on all, but for one of ``group``.
    NotImplementedError
        Within forward-mode differentiation, or a transform of torch.func.
    RuntimeError
        A process has ended, or did not make the same call within the timeout of the process group.
    """
    ring = Group(group)
    with ring.shared():
        plan_ring.check_transforms("zigzag_unshard", autograd.has_tangents(), autograd.is_transformed())
        plan_ring.check_tensor("shard", isinstance(shard, torch.Tensor), isinstance(shard, DTensor), shard)
        spec = arrays.describe(shard)
        plan.check_dense("shard", spec)
        device = spec.device.partition(":")[0]
        plan_ring.check_backend(device, ring.backends)
        plan_ring.check_no_gradient(torch.is_grad_enabled() and shard.requires_grad)
        dim = plan_ring.check_dim(dim, shard.dim())
        shard = shard.movedim(dim, 0)
    lengths = plan_ring.check_shards(ring.gather(Told(shapes=(tuple(shard.shape),), dtype=spec.dtype, device=device)))
    whole = [shard.new_empty(max(lengths), *shard.shape[1:]) for _ in lengths]
    padded = torch.cat([shard, shard.new_zeros(max(lengths) - len(shard), *shard.shape[1:])])
    with ring.explained():
        dist.all_gather(whole, padded, group=ring.group)
    spans = [plan_ring.spans(lengths, rank, True) for rank in range(ring.size)]
    parts = [(span, whole[rank]) for rank, pair in enumerate(spans) for span in pair]
    parts.sort(key=lambda part: (part[0].start, part[0].length))
    return torch.cat([rows[span.row : span.row + span.length] for span, rows in parts]).movedim(0, dim)
