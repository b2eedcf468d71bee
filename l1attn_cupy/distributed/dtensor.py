"""How DTensor shards the operators of this package: by batch and by heads, without communication."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .. import autograd_attention  # noqa: F401  defines the operators

#: Dimensions of an array after those of the batch, where they are not two.
_OWN_DIMS = {"grad_lse": 1, "cu_seqlens_q": 1, "cu_seqlens_k": 1}

#: Results of each operator that are gradients, by what they are the gradients of; elsewhere results have the whole
#: batch. Each may be left out by an argument.
_GRADIENTS = {
    "scores_backward": {"query": "need_query", "key": "need_key"},
    "attention_backward": {
        "query": "need_query",
        "key": "need_key",
        "value": "need_value",
        "attn_mask": "need_mask",
    },
}

_Placements = list[Placement | None]


@functools.cache
def register_dtensor() -> None:
    """Let `l1_scores` and `l1_attention` take DTensors, sharded by batch dimensions and heads, and their gradients too.

    Then tensor parallelism works as with PyTorch's own operators: where query, key and value are sharded by heads or by
    a batch dimension, every rank computes its own part and nothing is sent. What is broadcast stays whole; its gradient
    is a sum over ranks. Arrays that are sharded by length or channels are gathered first: for long sequences see
    `ring_l1_attention`. Call it once in each process; again does nothing.

    Raises
    ------
    ImportError
        This torch has no `torch.distributed.tensor.experimental.register_sharding`, or DTensor keeps what it knows of
        operators elsewhere.

    Notes
    -----
    With ``enable_gqa``, heads stay sharded only if those of key and value are a multiple of the size of the mesh, or
    one, or as many as those of query; otherwise they are gathered.
    """
    try:
        from torch.distributed.tensor.experimental import register_sharding

        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "register_dtensor needs a torch with torch.distributed.tensor.experimental.register_sharding, whose "
            f"DTensor has _op_dispatcher.sharding_propagator.op_to_schema_info, got {torch.__version__} ({error})"
        ) from error
    for name in ("scores", "scores_backward", "scores_jvp", "attention", "attention_backward"):
        op = getattr(torch.ops.l1attn, name).default
        register_sharding(op)(functools.partial(_shardings, op))
        # Results have other shapes with other flags, so what is known of them goes by these, too.
        first_option = next(n for n, given in enumerate(op._schema.arguments) if "Tensor" not in str(given.type))
        known[op] = dataclasses.replace(known[op], static_argnum=first_option)


def _shardings(op: Any, *given: Any) -> list[tuple[_Placements, _Placements]]:
    """Placements of results and arguments that go together: all replicated, or sharded by one batch dimension."""
    arguments = {known.name: one for known, one in zip(op._schema.arguments, given, strict=False)}
    arrays = {name: one for name, one in arguments.items() if hasattr(one, "placements")}
    batch = max(len(arrays[name].shape) - 2 for name in ("query", "key", "value") if name in arrays)
    found = [_sharding(op, arguments, arrays, batch, None)]
    for turn in range(1, batch + 1):
        if turn > 1 or _heads_may_be_sharded(arguments):
            found.append(_sharding(op, arguments, arrays, batch, turn))
    return found


def _heads_may_be_sharded(arguments: dict[str, Any]) -> bool:
    """Whether parts of the heads of query go with parts of those of key, with one for several."""
    if not arguments.get("enable_gqa", False):
        return True
    query, key = arguments["query"], arguments["key"]
    return key.shape[-3] in (1, query.shape[-3]) or key.shape[-3] % key.mesh.size() == 0


def _sharding(
    op: Any, arguments: dict[str, Any], arrays: dict[str, Any], batch: int, turn: int | None
) -> tuple[_Placements, _Placements]:
    """Sharded by the batch dimension that is ``turn`` before the last two, or None."""
    placed = {name: _placement(name, one.shape, turn) for name, one in arrays.items()}
    inputs: _Placements = [placed.get(name) for name in arguments]
    results: Sequence[Placement]
    gradients = _GRADIENTS.get(op._schema.name.partition("::")[2])
    if gradients is not None:
        whole = Replicate() if turn is None else Partial()
        results = [
            Replicate() if not arguments[need] else whole if placed[name] == Replicate() else placed[name]
            for name, need in gradients.items()
        ]
    else:
        own = Replicate() if turn is None else Shard(batch - turn)
        rounded = arrays["query"].tensor_meta.dtype not in (torch.float32, torch.float64)
        kept = own if arguments.get("keep", False) and rounded else Replicate()
        results = [own, own, kept][: len(op._schema.returns)]
    return list(results), inputs


def _placement(name: str, shape: Sequence[int], turn: int | None) -> Placement:
    """Of an argument: replicated where it is broadcast."""
    dim = -1 if turn is None else len(shape) - _OWN_DIMS.get(name, 2) - turn
    return Shard(dim) if dim >= 0 and shape[dim] != 1 else Replicate()
