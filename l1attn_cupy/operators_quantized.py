"""L1 scores of 8-bit query and key, and attention, as PyTorch operators; as `operators`, but without gradients."""

from __future__ import annotations

from typing import Any

import torch

from . import arrays, operators_attention, plan, plan_attention, plan_quantized, run, run_attention
from .autograd import dispatches, is_differentiated, spec_of, under_autocast
from .operators import _OPTIONS, TAGS, broadcast, library, own_shape, with_batch_first
from .plan_attention import AttentionOptions

library.define(f"scores_quantized(Tensor query, Tensor key, Tensor? quant_scale, {_OPTIONS}) -> Tensor", tags=TAGS)
library.define(
    "attention_quantized(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? quant_scale, "
    f"{operators_attention._OPTIONS}) -> (Tensor, Tensor)",
    tags=TAGS,
)

Optional = torch.Tensor | None


def _scores(query: torch.Tensor, key: torch.Tensor, quant_scale: Optional, *options: Any) -> torch.Tensor:
    quant_scale = None if quant_scale is None else quant_scale.resolve_neg()
    scales = None if quant_scale is None else arrays.describe(quant_scale)
    call = plan_quantized.cached_scores(arrays.describe(query), arrays.describe(key), scales, *options)
    return run.scores_quantized(call, query, key, quant_scale)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Optional, quant_scale: Optional, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax."""
    given = query, key, *(None if x is None else x.resolve_neg() for x in (value, mask, quant_scale))
    return run_attention.attention_quantized(given, AttentionOptions(*options))


def _fake_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Optional, quant_scale: Optional, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    of_value = query.new_empty(query.shape, dtype=value.dtype)
    out, softmax, _ = operators_attention._fake_attention(of_value, key, value, mask, None, None, False, *options)
    return out, softmax


def _fake_scores(query: torch.Tensor, key: torch.Tensor, quant_scale: Optional, *options: Any) -> torch.Tensor:
    plan.check_matrix("query", tuple(query.shape))
    plan.check_matrix("key", tuple(key.shape))
    shapes = tuple(query.shape), tuple(key.shape)
    batch = broadcast([shape[:-2] for shape in shapes], lambda: plan.broadcast_batch(*shapes))
    return query.new_empty(*batch, query.shape[-2], key.shape[-2], dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    library.impl("scores_quantized", _scores, _device)
    library.impl("attention_quantized", _attention, _device)
torch.library.register_fake("l1attn::scores_quantized", _fake_scores, lib=library)
torch.library.register_fake("l1attn::attention_quantized", _fake_attention, lib=library)


def _vmap_scores(info: Any, in_dims: tuple, *given: Any) -> tuple[torch.Tensor, int]:
    for name, array, dim in zip(("query", "key"), given, in_dims, strict=False):
        plan.check_matrix(name, own_shape(array, dim))
    return torch.ops.l1attn.scores_quantized(*with_batch_first(info.batch_size, in_dims, given[:3]), *given[3:]), 0


def _vmap_attention(
    info: Any, in_dims: tuple, *given: Any
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    for name, array, dim in zip(("query", "key", "value"), given, in_dims, strict=False):
        plan.check_matrix(name, own_shape(array, dim))
    inputs = with_batch_first(info.batch_size, in_dims, given[:5])
    return torch.ops.l1attn.attention_quantized(*inputs, *given[5:]), (0, 0)


torch.library.register_vmap("l1attn::scores_quantized", _vmap_scores, lib=library)
torch.library.register_vmap("l1attn::attention_quantized", _vmap_attention, lib=library)


def l1_scores(query: Any, key: Any, quant_scale: Any | None, *options: Any) -> torch.Tensor:
    """`l1attn_cupy.l1_scores` for 8-bit tensors."""
    given = {"query": query, "key": key} | ({} if quant_scale is None else {"quant_scale": quant_scale})
    if not torch.compiler.is_compiling():
        options = plan.option_types(*options)
        if not all(map(dispatches, given.values())):
            scales = None if quant_scale is None else spec_of("quant_scale", quant_scale)
            plan_quantized.scores((spec_of("query", query), spec_of("key", key), scales), *options)
    check_no_gradient(given)
    return torch.ops.l1attn.scores_quantized(query, key, quant_scale, *options)


def l1_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None,
    quant_scale: Any | None,
    options: AttentionOptions,
    return_lse: bool,
) -> tuple[torch.Tensor, Optional]:
    """`l1attn_cupy.l1_attention` for 8-bit tensors; lse may be None if it is not wanted."""
    everything = {"query": query, "key": key, "value": value, "attn_mask": mask, "quant_scale": quant_scale}
    optional = plan_attention.OPTIONAL
    given = {name: array for name, array in everything.items() if array is not None or name not in optional}
    if not torch.compiler.is_compiling() and not all(map(dispatches, given.values())):
        specs = [spec_of(name, array) if name in given else None for name, array in everything.items()]
        plan_quantized.attention(specs, options)
    check_no_gradient(given)
    value, mask = under_autocast(value, mask)
    out, softmax = torch.ops.l1attn.attention_quantized(query, key, value, mask, quant_scale, *options)
    return out, arrays.log_sum_exp(softmax) if return_lse else None


def check_no_gradient(given: dict[str, torch.Tensor]) -> None:
    """Raise for what somebody would differentiate by."""
    plan_quantized.check_no_gradient(**{name: is_differentiated(array) for name, array in given.items()})
