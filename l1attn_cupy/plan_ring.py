"""Every check of ring attention and every error message, and which part of the scores each step of the ring computes.

Nothing here communicates: what the ranks tell each other comes as `Told`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from .plan import Shape
from .plan_attention import UNLIMITED

_NAMES = ("query", "key", "value")
_FAR = 1 << 40  # farther than any key is from any query


class Told(NamedTuple):
    """What each rank tells the others of its call: its arrays and options, or the error that it found by itself.

    ``needs`` says which of query, key and value need a gradient.
    """

    error: str = ""
    shapes: tuple[Shape, ...] = ()
    dtype: str = ""
    device: str = ""
    needs: tuple[bool, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


class Span(NamedTuple):
    """Rows of a shard that lie side by side in the sequence: first one in the shard, first one in the sequence."""

    row: int
    start: int
    length: int


class Block(NamedTuple):
    """Rows of a shard's queries against rows of a shard of keys, with the window between their numbers within these.

    Every query attends to a key or more, and every key is attended to.
    """

    first_q: int
    end_q: int
    first_k: int
    end_k: int
    window: tuple[int, int]


class RingPlan(NamedTuple):
    """A checked call on all ranks. ``band`` is how many keys before and after its own place a query attends to."""

    rank: int
    size: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    band: tuple[int, int]
    zigzag: bool

    def source(self, step: int) -> int:
        """The rank whose keys are here in a step; each step they move on to the next rank."""
        return (self.rank - step) % self.size

    def blocks(self, step: int) -> tuple[Block, ...]:
        """What a step computes; () where no query of this rank attends to any of its keys."""
        return blocks(self, self.source(step))


def check_initialised(initialised: bool) -> None:
    """Raise unless there is a process group."""
    if not initialised:
        raise ValueError(
            "group must be an initialised process group, got None before a call of torch.distributed.init_process_group"
        )


def check_group(is_group: bool, group: Any, rank: int, members: Sequence[int] | None) -> None:
    """Raise unless ``group`` is a process group that has this process, ``rank`` among all, among its ``members``.

    They are None if it was destroyed, and () if nothing is known of it but that this process is not one of them.
    """
    if not is_group:
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {group!r}")
    if members is None:
        raise ValueError(f"group must be a process group that is in use, got {group!r}, which was destroyed")
    if rank not in members:
        got = f"one of the ranks {list(members)}" if members else "another one"
        raise ValueError(f"group must contain the calling process, rank {rank}, got {got}")


def check_backend(device: str, backends: str) -> None:
    """Raise unless a group with ``backends``, such as "cpu:gloo,cuda:nccl", sends tensors on a kind of device."""
    backend = dict(pair.split(":") for pair in backends.split(",")).get(device)
    if backend is None or (device, backend) == ("cuda", "gloo"):
        raise ValueError(
            f"group must have a backend that sends tensors on {device} (gloo on cpu, nccl on cuda), got {backends}"
        )


def check_transforms(function: str, forward_mode: bool, transformed: bool) -> None:
    """Raise within what an exchange between processes does not know: tangents, and transforms of torch.func."""
    if forward_mode:
        raise NotImplementedError(f"{function} has no forward-mode derivative")
    if transformed:
        raise NotImplementedError(f"{function} must be called outside of transforms of torch.func, got a call in one")


def check_one_gradient(function: str, is_batch: bool) -> None:
    """Raise where gradients come in batches, with ``is_grads_batched`` of `torch.autograd.grad`."""
    if is_batch:
        raise NotImplementedError(f"{function} must be computed of one gradient at a time, got is_grads_batched=True")


def check_tensor(name: str, is_tensor: bool, is_dtensor: bool, array: Any, whole: bool = False) -> None:
    """Raise unless ``array`` is a torch tensor, and this rank's own or, as in `zigzag_shard`, the whole."""
    if is_dtensor:
        what, take = ("the whole sequence", "full_tensor") if whole else ("this rank's shard", "to_local")
        raise TypeError(f"{name} must be {what} as a torch.Tensor, got a DTensor; take {name}.{take}()")
    if not is_tensor:
        raise TypeError(f"{name} must be a torch.Tensor, got {type(array).__module__}.{type(array).__qualname__}")


def check_dim(dim: Any, ndim: int) -> int:
    """The dimension ``dim`` of an array, counted from the first."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must be from {-ndim} to {ndim - 1} for a tensor of {ndim} dimensions, got {dim}")
    return dim % ndim


def check_no_gradient(tensor_tracked: bool) -> None:
    """Raise where gathering shards would drop a gradient."""
    if tensor_tracked:
        raise ValueError(
            "shard must not require a gradient, as there is none through zigzag_unshard, got one that does; compute "
            "the loss from the shards, or call it under torch.no_grad()"
        )


def ring(told: Sequence[Told], rank: int) -> RingPlan:
    """Check that the calls of all ranks fit together; the errors are the same on every rank.

    A rank that found an error by itself raises that instead.
    """
    _check_no_error(told)
    for field, what in (("dtype", "dtype"), ("device", "kind of device")):
        _check_alike(f"query must have one {what} on all ranks", [getattr(one, field) for one in told], TypeError)
    for n, name in enumerate(_NAMES):
        kinds = [(*one.shapes[n][:-2], "*", one.shapes[n][-1]) for one in told]
        _check_alike(f"{name} must have one shape on all ranks, but for the length", kinds)
        _check_alike(f"{name} must require a gradient on all ranks or on none", [one.needs[n] for one in told])
    for n, (name, _) in enumerate(told[0].options):
        _check_alike(f"{name} must be the same on all ranks", [one.options[n][1] for one in told])
    options = dict(told[0].options)
    lengths_q, lengths_k = (tuple(one.shapes[n][-2] for one in told) for n in (0, 1))
    if options["zigzag"]:
        check_zigzag("query", lengths_q)
        check_zigzag("key", lengths_k)
    return RingPlan(rank, len(told), lengths_q, lengths_k, options["window"], options["zigzag"])


def _check_no_error(told: Sequence[Told]) -> None:
    for other, one in enumerate(told):
        if one.error:
            raise ValueError(f"the call on rank {other} must be without an error, got {one.error}")


def _check_alike(requirement: str, given: Sequence[Any], error: type[Exception] = ValueError) -> None:
    for other, one in enumerate(given):
        if one != given[0]:
            raise error(f"{requirement}, got {_shown(given[0])} on rank 0 and {_shown(one)} on rank {other}")


def _shown(value: Any) -> str:
    """A shape without the quotes of its star."""
    return str(value).replace("'*'", "*") if isinstance(value, tuple) else repr(value)


def check_zigzag(name: str, lengths: Sequence[int]) -> None:
    """Raise unless these are the lengths that `zigzag_shard` cuts a sequence into."""
    parts, size = chunks(sum(lengths), 2 * len(lengths)), len(lengths)
    wanted = [parts[rank] + parts[2 * size - 1 - rank] for rank in range(size)]
    if list(lengths) != wanted:
        raise ValueError(
            f"{name} must have the lengths {wanted} on the ranks for zigzag=True, as from zigzag_shard, "
            f"got {list(lengths)}"
        )


def check_shards(told: Sequence[Told]) -> list[int]:
    """Lengths of all ranks' shards, of which each tells its shape with the length first, if they fit together."""
    _check_no_error(told)
    _check_alike("shard must have one dtype on all ranks", [one.dtype for one in told], TypeError)
    _check_alike("shard must be on one kind of device on all ranks", [one.device for one in told], TypeError)
    shapes = [one.shapes[0] for one in told]
    kinds = [("*", *shape[1:]) for shape in shapes]
    _check_alike("shard must have one shape on all ranks, but for the length (here first)", kinds)
    lengths = [shape[0] for shape in shapes]
    check_zigzag("shard", lengths)
    return lengths


def chunks(length: int, number: int) -> list[int]:
    """Lengths of as many even chunks, as of `torch.tensor_split`: the first ones have one row more."""
    return [length // number + (n < length % number) for n in range(number)]


def spans(lengths: Sequence[int], rank: int, zigzag: bool) -> tuple[Span, ...]:
    """The rows of a rank's shard: of its turn, or of two chunks, one from either end of the sequence."""
    if not zigzag:
        return (Span(0, sum(lengths[:rank]), lengths[rank]),)
    parts = chunks(sum(lengths), 2 * len(lengths))
    early, late = rank, 2 * len(lengths) - 1 - rank
    return Span(0, sum(parts[:early]), parts[early]), Span(parts[early], sum(parts[:late]), parts[late])


@functools.lru_cache(maxsize=1024)
def blocks(plan: RingPlan, source: int) -> tuple[Block, ...]:
    """What this rank's queries make of the keys of the rank ``source``, in as few blocks as can be."""
    queries = spans(plan.lengths_q, plan.rank, plan.zigzag)
    keys = spans(plan.lengths_k, source, plan.zigzag)
    if queries == keys and plan.band == (UNLIMITED, 0):  # what is causal in the sequence is so among these rows
        whole = plan.lengths_q[plan.rank]
        return (Block(0, whole, 0, whole, plan.band),) if whole else ()
    found = [_block(q, k, plan.band) for q in queries for k in keys]
    return tuple(_joined(_joined([block for block in found if block], "k", "q"), "q", "k"))


def _block(q: Span, k: Span, band: tuple[int, int]) -> Block | None:
    """One span of queries against one of keys, without rows on the edge that have no part in it.

    Query i of the span attends to key j if ``low <= j - i <= high``.
    """
    between = q.start - k.start
    low, high = (between - band[0], between + band[1])
    low, high = -_FAR if band[0] == UNLIMITED else low, _FAR if band[1] == UNLIMITED else high
    # Keys before the first one of query 0, then queries before the first one of key 0.
    skip_k = max(0, low)
    low, high = low - skip_k, high - skip_k
    skip_q = max(0, -high)
    low, high = low + skip_q, high + skip_q
    length_q = min(q.length - skip_q, k.length - skip_k - low)
    length_k = min(k.length - skip_k, q.length - skip_q + high)
    if length_q <= 0 or length_k <= 0:
        return None
    left = UNLIMITED if -low >= length_q - 1 else -low
    right = UNLIMITED if high >= length_k - 1 else high
    first_q, first_k = q.row + skip_q, k.row + skip_k
    return Block(first_q, first_q + length_q, first_k, first_k + length_k, (left, right))


def _joined(found: Sequence[Block], along: str, across: str) -> list[Block]:
    """Blocks without a window that lie side by side as one; ``along`` and ``across`` are "q" and "k" or "k" and "q"."""
    first, end = f"first_{along}", f"end_{along}"
    result: list[Block] = []
    for block in sorted(found, key=lambda block: (getattr(block, f"first_{across}"), getattr(block, first))):
        longer = result[-1]._replace(**{end: getattr(block, end)}) if result else None
        whole = block.window == (UNLIMITED, UNLIMITED)
        touches = bool(result) and getattr(result[-1], end) == getattr(block, first)
        if longer is not None and touches and whole and longer == block._replace(**{first: getattr(longer, first)}):
            result[-1] = longer
        else:
            result.append(block)
    return result
