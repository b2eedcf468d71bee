"""Process groups: which one is meant, what its ranks tell each other, and tensors on their way to the next rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import plan_ring


class Group:
    """A checked process group, seen as a ring from this process.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        By default all processes.
    """

    def __init__(self, group: Any | None) -> None:
        plan_ring.check_initialised(dist.is_initialized())
        self.group: Any = dist.group.WORLD if group is None else group
        other = self.group is dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives those it leaves out
        is_group = other or isinstance(self.group, dist.ProcessGroup)
        members = _members(self.group) if is_group and not other else ()
        plan_ring.check_group(is_group, self.group, dist.get_rank(), members)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.backends = str(dist.get_backend_config(self.group))  # "cpu:gloo,cuda:nccl"
        ranks = dist.get_process_group_ranks(self.group)
        self.next, self.previous = (ranks[(self.rank + way) % self.size] for way in (1, -1))

    def gather(self, told: Any) -> list[Any]:
        """What all ranks tell, in the order of the ranks."""
        everything: list[Any] = [None] * self.size
        with self.explained(), torch._C._DisableFuncTorch():  # an error within vmap is told without being transformed
            dist.all_gather_object(everything, told, group=self.group)
        return everything

    @contextlib.contextmanager
    def shared(self, tell: bool = True) -> Iterator[None]:
        """Around what this rank checks by itself: an error reaches the others, which would wait, if they `gather`."""
        try:
            yield
        except Exception as error:
            if tell:
                self.gather(plan_ring.Told(f"{type(error).__name__}: {error}"))
            raise

    def pass_on(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], tag: int) -> Transfer:
        """Begin to send to the next rank and to receive from the previous one; nothing of what is empty.

        Each tensor has a tag, from ``tag`` on. All are contiguous.
        """
        ops = []
        for n, (sent, received) in enumerate(zip(outgoing, incoming, strict=True)):
            if sent.numel():
                ops.append(dist.P2POp(dist.isend, sent, self.next, self.group, tag + n))
            if received.numel():
                ops.append(dist.P2POp(dist.irecv, received, self.previous, self.group, tag + n))
        with self.explained():
            return Transfer(self, dist.batch_isend_irecv(ops) if ops else [], outgoing, incoming)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Adds to an error of the backend who did not hear from whom."""
        try:
            yield
        except NotImplementedError:  # of torch, for a kind of tensor; communication did not begin
            raise
        except RuntimeError as error:
            ranks = sorted({self.previous, self.next})
            raise RuntimeError(
                f"rank {dist.get_rank()} could not communicate with its neighbours, ranks {ranks}: a process has "
                f"ended, or did not make the same call within the timeout of the process group ({error})"
            ) from error


def _members(group: Any) -> list[int] | None:
    """The ranks of a group; None if it was destroyed."""
    try:
        return dist.get_process_group_ranks(group)
    except KeyError:
        return None


class Transfer:
    """Tensors on their way; both stay as they are until `wait` has returned."""

    def __init__(
        self, group: Group, works: list[Any], outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]
    ) -> None:
        self._group, self._works, self._outgoing, self._incoming = group, works, outgoing, incoming

    def wait(self) -> Sequence[torch.Tensor]:
        """What came in, once both ways are done."""
        with self._group.explained():
            for work in self._works:
                work.wait()
        return self._incoming
