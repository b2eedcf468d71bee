"""Ring attention: each rank keeps its queries, while keys and values go round all ranks.

What a rank computes from the keys of one step are attention by itself, and how its softmax was taken. The results of
all steps are joined from these. The backward pass goes by the softmax of the whole, and so needs no joining: its
parts are the parts of the sums. Gradients of keys and values go round with them, and one step farther, to their owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from .. import (
    arrays,
    autograd,
    operators_attention,  # noqa: F401  # defines torch.ops.l1attn
    plan_attention,
    plan_ring,
)
from ..plan_attention import AttentionOptions
from ..plan_ring import Block, RingPlan, Told
from .groups import Group, Transfer

_TAG_OF_KEYS, _TAG_OF_GRADIENTS = 0, 2


def ring_l1_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: Any | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    enable_gqa: bool = False,
    score: str = "inverse",
    eps: float = 1e-3,
    window: tuple[int, int] | None = None,
    zigzag: bool = False,
    return_lse: bool = False,
    check: bool = True,
    backend: str | None = None,
    variant: str | None = None,
) -> Any:
    """`l1_attention` of a sequence of which each process holds a part. All processes of the group must call it::

        rank 0   query 0   key 0, value 0   then 3, 2, 1          step 0: own keys; meanwhile those of step 1 arrive
        rank 1   query 1   key 1, value 1   then 0, 3, 2
        rank 2   query 2   key 2, value 2   then 1, 0, 3
        rank 3   query 3   key 3, value 3   then 2, 1, 0

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, L, E)
        This rank's rows of the sequence; float16, bfloat16, float32 or float64, any strides. L may be another on every
        rank, and may be 0.
    key : torch.Tensor, shape (..., Hk, S, E)
    value : torch.Tensor, shape (..., Hk, S, Ev)
        Of the dtype and device of ``query``. S may be another on every rank, and may differ from L.
    group : torch.distributed.ProcessGroup, optional
        By default all processes. Rows of rank 0 come first in the sequence, and so on.
    is_causal, window
        As in `l1_attention`, between places in the whole sequence.
    scale, enable_gqa, score, eps, backend, variant
        As in `l1_attention`.
    zigzag : bool
        Shards are those of `zigzag_shard`, which gives all ranks as much to do where attention is causal. Otherwise
        shards follow one another.
    return_lse : bool
        Also return the log-sum-exp of each query's masked scores.
    check : bool
        Whether ranks tell each other shapes and options first, which takes a moment (and on a GPU waits for it). False
        promises that shapes and options are the same on all ranks.

    Returns
    -------
    out : torch.Tensor, shape (..., Hq, L, Ev)
        Of this rank's queries; differentiable.
    lse : torch.Tensor, shape (..., Hq, L)
        If ``return_lse``: float32 (float64 for float64); differentiable.

    Raises
    ------
    TypeError, ValueError
        As `l1_attention`; also where there is no process group, or calls do not fit together. An error of one rank is
        one on all, but for one of ``group``, through which they would hear of it: the rank that gave it raises at once,
        the others when the timeout of their group is over.
    NotImplementedError
        Within forward-mode differentiation, or a transform of torch.func.
    RuntimeError
        A process has ended, or did not make the same call within the timeout of the process group. The group is of no
        use after that. Between GPUs, NCCL's watchdog ends the process instead, unless TORCH_NCCL_BLOCKING_WAIT=1.

    Notes
    -----
    A rank holds its shards, those keys and values that it computes with and those that arrive, and gradients likewise.
    Results of steps are joined in float32 (float64 for float64), and gradients are summed in it; those of 16-bit arrays
    are rounded once in each step. The backward pass communicates too, so all ranks must run it, and in the same order
    where there are several calls. The same bits come from every run with as many ranks. A query whose keys on one
    rank are all infinitely far away gives NaN. The gradients can be differentiated no further.

    References
    ----------
    Liu, Zaharia and Abbeel, "Ring attention with blockwise transformers for near-infinite context", 2023.
    """
    given = {"query": query, "key": key, "value": value}
    flags = {"zigzag": zigzag, "return_lse": return_lse, "check": check}
    options = (enable_gqa, is_causal, window, score, scale, eps, backend, variant)
    run = torch.compiler.disable(_ring) if torch.compiler.is_compiling() else _ring
    out, lse = run(group, given, flags, options)
    return (out, lse) if return_lse else out


def _ring(
    group: Any, given: dict[str, Any], flags: dict[str, bool], options: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse; on its own, as `torch.compile` cannot trace communication of objects."""
    ring = Group(group)
    with ring.shared(flags["check"] is not False):
        plan_ring.check_transforms("ring_l1_attention", autograd.has_tangents(), autograd.is_transformed())
        for name, flag in flags.items():
            plan_attention.check_flag(name, flag)
        checked = plan_attention.option_types(*options)
        given = _cast(given)
        told = _tell(given, checked, is_causal=options[1], zigzag=flags["zigzag"])
        plan_ring.check_backend(told.device, ring.backends)
    everything = ring.gather(told) if flags["check"] else [told] * ring.size
    call = _Call(plan_ring.ring(everything, ring.rank), ring, checked)
    out, lse = _RingAttention.apply(*given.values(), call)
    return out, lse


def _cast(given: dict[str, Any]) -> dict[str, Any]:
    """In autocast's dtype, where it is on, once they are known to be tensors; `_tell` refuses other kinds of these."""
    for name, array in given.items():
        plan_ring.check_tensor(name, isinstance(array, torch.Tensor), isinstance(array, DTensor), array)
    if not all(map(autograd.dispatches, given.values())):
        return given
    return dict(zip(given, autograd.under_autocast(*given.values()), strict=True))


def _tell(given: dict[str, Any], options: AttentionOptions, is_causal: bool, zigzag: bool) -> Told:
    """What other ranks must know of this one's call, once it is checked by itself."""
    specs = [arrays.describe(array) for array in given.values()]
    plan_attention.attention([*specs, None], options)
    return Told(
        shapes=tuple(spec.shape for spec in specs),
        dtype=specs[0].dtype,
        device=specs[0].device.partition(":")[0],
        needs=tuple(torch.is_grad_enabled() and array.requires_grad for array in given.values()),
        options=(
            ("enable_gqa", options.enable_gqa),
            ("is_causal", is_causal),
            ("window", (options.left, options.right)),
            ("score", options.score),
            ("scale", options.scale),
            ("eps", options.eps),
            ("zigzag", zigzag),
        ),
    )


class _Call(NamedTuple):
    """All of a call but its arrays."""

    plan: RingPlan
    group: Group
    options: AttentionOptions


class _RingAttention(torch.autograd.Function):
    """Saves its inputs, the softmax of the whole, and out before it was rounded; of other ranks nothing."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        unrounded, softmax = _forward(call, query, key, value)
        out = unrounded.to(query.dtype)
        ctx.save_for_backward(query, key, value, unrounded, softmax)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, arrays.log_sum_exp(softmax)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        name = "the gradient of ring_l1_attention"  # before anything is sent that nobody would receive
        plan_ring.check_transforms(name, autograd.has_tangents(), autograd.is_transformed())
        plan_ring.check_one_gradient(name, any(autograd.is_batch(x) for x in (grad_out, grad_lse) if x is not None))
        query, key, value, out, softmax = ctx.saved_tensors
        if grad_out is None:  # other ranks may have one
            grad_out = torch.zeros_like(out, dtype=query.dtype)
        with torch.no_grad():
            gradients = _backward(
                ctx.call, (query, key, value), grad_out, out, softmax, grad_lse, ctx.needs_input_grad[:3]
            )
        if torch.is_grad_enabled():
            sources = [array for array in (grad_out, grad_lse, query, key, value) if array is not None]
            gradients = [x if x is None else _NotDifferentiable.apply(x, *sources) for x in gradients]
        return *gradients, None


class _NotDifferentiable(torch.autograd.Function):
    """Passes a gradient on, and raises when it is itself differentiated.

    Torch's ``once_differentiable`` does so only if the incoming gradient requires a gradient. In a gradient penalty it
    does not, and the term that goes through query, key and value would be missing without a word.
    """

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("the gradient of ring_l1_attention cannot be differentiated")


def _forward(
    call: _Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out unrounded, and softmax, of this rank's queries and all keys."""
    specs = [arrays.describe(array) for array in (query, key, value)]
    shape = plan_attention.attention([*specs, None], call.options).out_shape
    summed = torch.float64 if query.dtype is torch.float64 else torch.float32
    out = query.new_zeros(shape, dtype=summed)
    softmax = torch.stack([out.new_full(shape[:-1], -torch.inf), out.new_zeros(shape[:-1])], -1)
    keys = _Travelling(call, [key, value])
    for step in range(call.plan.size):
        keys.send(step)
        for block in call.plan.blocks(step):
            rows = slice(block.first_q, block.end_q)
            _attend(call, block, query[..., rows, :], keys, out[..., rows, :], softmax[..., rows, :])
        keys.receive()
    return out, softmax


def _attend(
    call: _Call, block: Block, query: torch.Tensor, keys: _Travelling, out: torch.Tensor, softmax: torch.Tensor
) -> None:
    """Take a block into ``out`` and ``softmax`` of its queries."""
    rounded, more_softmax, unrounded = torch.ops.l1attn.attention(
        query, *keys.rows(block), None, None, None, True, *_of_block(call.options, block)
    )
    _join(out, softmax, rounded if rounded.dtype is out.dtype else unrounded, more_softmax)


def _of_block(options: AttentionOptions, block: Block) -> AttentionOptions:
    return options._replace(left=block.window[0], right=block.window[1])


def _join(out: torch.Tensor, softmax: torch.Tensor, more: torch.Tensor, more_softmax: torch.Tensor) -> None:
    """Take attention to more keys into ``out`` and ``softmax``, in place.

    Every query attends to one of these keys at least, so that the largest score is not -inf any more.
    """
    largest = torch.maximum(softmax[..., 0], more_softmax[..., 0])
    weight, more_weight = ((x[..., 0] - largest).exp() * x[..., 1] for x in (softmax, more_softmax))
    total = weight + more_weight
    out.mul_((weight / total).unsqueeze(-1)).addcmul_(more, (more_weight / total).unsqueeze(-1))
    softmax[..., 0], softmax[..., 1] = largest, total


class _Travelling:
    """Keys and values as they go round: those of this step, and those of the next on their way."""

    def __init__(self, call: _Call, own: Sequence[torch.Tensor]) -> None:
        self._call = call
        self._now: Sequence[torch.Tensor] = own
        self._transfer: Transfer | None = None

    def rows(self, block: Block) -> list[torch.Tensor]:
        """Keys and values of a block, as views."""
        return [array[..., block.first_k : block.end_k, :] for array in self._now]

    def send(self, step: int) -> None:
        """Begin to pass on what is here; after the last step it has been everywhere."""
        if step + 1 < self._call.plan.size:
            outgoing = [array.contiguous() for array in self._now]
            incoming = _of_next_step(self._call, step, outgoing)
            self._transfer = self._call.group.pass_on(outgoing, incoming, _TAG_OF_KEYS)

    def receive(self) -> None:
        """Wait for the keys and values of the next step, if any."""
        if self._transfer is not None:
            self._now, self._transfer = self._transfer.wait(), None


def _of_next_step(call: _Call, step: int, arrays_now: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """New arrays like those of a step, for what comes from the previous rank."""
    length = call.plan.lengths_k[call.plan.source(step + 1)]
    return [array.new_empty((*array.shape[:-2], length, array.shape[-1])) for array in arrays_now]


def _backward(
    call: _Call,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_out: torch.Tensor,
    out: torch.Tensor,
    softmax: torch.Tensor,
    grad_lse: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> list[torch.Tensor | None]:
    """The gradients that are needed of query, key and value."""
    query, key, value = given
    dquery = torch.zeros_like(query, dtype=out.dtype) if needs[0] else None
    keys, sums = _Travelling(call, [key, value]), _Sums(call, (key, value), needs[1:], out.dtype)
    options = AttentionOptions(*autograd.of_backward(call.options, "attention_backward"))
    for step in range(call.plan.size):
        keys.send(step)
        parts = []
        for block in call.plan.blocks(step):
            rows = slice(block.first_q, block.end_q)
            dq, *of_keys, _ = torch.ops.l1attn.attention_backward(
                grad_out[..., rows, :],
                *(query[..., rows, :], *keys.rows(block), None, None, None),
                *(out[..., rows, :], softmax[..., rows, :], None if grad_lse is None else grad_lse[..., rows]),
                *(*needs, False, *_of_block(options, block)),
            )
            if dquery is not None:
                dquery[..., rows, :] += dq
            parts.append((block, of_keys))
            del dq, of_keys
        keys.receive()
        sums.add(step, parts)
    return [None if dquery is None else dquery.to(query.dtype), *sums.own()]


class _Sums:
    """Gradients of keys and values as they go round, one step behind these."""

    def __init__(self, call: _Call, given: Sequence[torch.Tensor], needs: Sequence[bool], dtype: torch.dtype) -> None:
        self._call, self._needs, self._dtype = call, needs, given[0].dtype
        self._transfer: Transfer | None = None
        self._now: Sequence[torch.Tensor] = [
            array.new_zeros(array.shape, dtype=dtype) for array, need in zip(given, needs, strict=True) if need
        ]

    def add(self, step: int, parts: list[tuple[Block, list[torch.Tensor]]]) -> None:
        """Add what a step found of its keys to what other ranks found of them, and pass the sums on."""
        self._receive()
        while parts:
            block, gradients = parts.pop()
            needed = [gradient for gradient, need in zip(gradients, self._needs, strict=True) if need]
            for total, gradient in zip(self._now, needed, strict=True):
                total[..., block.first_k : block.end_k, :] += gradient
        if self._call.plan.size > 1:
            incoming = _of_next_step(self._call, step, self._now)
            self._transfer = self._call.group.pass_on(self._now, incoming, _TAG_OF_GRADIENTS)

    def _receive(self) -> None:
        if self._transfer is not None:
            self._now, self._transfer = self._transfer.wait(), None

    def own(self) -> list[torch.Tensor | None]:
        """The gradients of this rank's key and value, back from all others; None where they are not needed."""
        self._receive()
        sums = iter(self._now)
        return [next(sums).to(self._dtype) if need else None for need in self._needs]
