"""Fused attention in PyTorch's autograd: thin Functions around the operators of `operators_attention`; see `autograd`.

Their second derivatives, and tangents, are those of `composition`, as the fused operators do not have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import (
    arrays,
    composition,
    operators_attention,  # defines torch.ops.l1attn
    plan_attention,
    run_attention,
)
from .autograd import (
    Differentiable,
    check_not_differentiated,
    dispatches,
    has_tangents,
    in_both_forms,
    is_recorded,
    is_tracked,
    is_transformed,
    of_backward,
    spec_of,
    under_autocast,
    undifferentiated,
)
from .operators_attention import Optional
from .plan_attention import OPTIONAL, AttentionOptions, Segments


@in_both_forms
class _Attention(Differentiable):
    """Saves its inputs, softmax, and out before it was rounded, which is a result that nobody else sees.

    Softmax is differentiated as the log-sum-exp that is made of it: the gradient of its first part is that of lse.
    """

    @staticmethod
    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Optional,
        ends_q: Optional,
        ends_k: Optional,
        keep: bool,
        *options: Any,
    ) -> tuple[torch.Tensor, ...]:
        inputs = (query, key, value, mask, ends_q, ends_k)
        return undifferentiated(operators_attention.attention, inputs, True, *options)

    @staticmethod
    def setup(ctx: Any, inputs: tuple, output: tuple) -> None:
        given, ctx.options = inputs[:6], inputs[7:]
        out, softmax, unrounded = output
        rounded = out.dtype not in (torch.float32, torch.float64)
        ctx.save_for_backward(*given, unrounded if rounded else out, softmax)
        ctx.mark_non_differentiable(unrounded)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Optional, grad_softmax: Optional, _: Any) -> tuple[Optional, ...]:
        if grad_out is None and grad_softmax is None:
            return (None,) * 15
        *inputs, out, softmax = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        grad_lse = None if grad_softmax is None else grad_softmax[..., 0]
        grad_out = torch.zeros_like(out, dtype=inputs[0].dtype) if grad_out is None else grad_out
        given = (grad_out, *inputs, out, softmax, grad_lse, *needed, *ctx.options)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                gradients = _AttentionBackward.compute(*given)
        else:
            gradients = (_AttentionBackward.run if is_tracked() else _AttentionBackward.compute)(*given)
        return *(array if need else None for array, need in zip(gradients, needed, strict=True)), *(None,) * 11


@in_both_forms
class _AttentionBackward(Differentiable):
    """The gradients as a function of those of out and lse and of the inputs, of which out and softmax are functions.

    Its arguments are those of the operator.
    """

    @staticmethod
    def compute(*inputs: Any) -> tuple[torch.Tensor, ...]:
        options = of_backward(inputs[14:], "attention_backward")
        return undifferentiated(operators_attention.attention_backward, inputs[:10], *inputs[10:14], *options)

    @staticmethod
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.needed, ctx.options = inputs[10:14], inputs[14:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
        """Composed, and so in memory that grows with the product of the lengths."""
        saved = ctx.saved_tensors
        varied = [i for i in (0, 1, 2, 3, 4, 9) if ctx.needs_input_grad[i]]
        chosen = [i for i, need in enumerate(ctx.needed) if need and cotangents[i] is not None]
        found: dict[int, torch.Tensor] = {}
        if chosen:

            def gradients(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
                given = list(saved)
                for i, value in zip(varied, values, strict=True):
                    given[i] = value
                return _composed_gradients(given, chosen, AttentionOptions(*ctx.options))

            pull: Any = torch.func.vjp(gradients, *(saved[i] for i in varied))[1]
            found = dict(zip(varied, pull(tuple(cotangents[i] for i in chosen)), strict=True))
        return tuple(found.get(i) for i in range(22))


_Attention.differentiates("attention")
_AttentionBackward.differentiates("attention_backward")


def _composed_gradients(given: list[Any], chosen: list[int], options: AttentionOptions) -> tuple[torch.Tensor, ...]:
    """Gradients of those of query, key, value and mask that are ``chosen``, by operations that have derivatives."""
    grad_out, *inputs = given[:7]
    grad_lse = given[9]

    def attention(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        replaced = list(inputs)
        for i, value in zip(chosen, values, strict=True):
            replaced[i] = value
        query, key, value, mask, ends_q, ends_k = replaced
        return composition.attention(query, key, value, mask, ends_q, ends_k, options)

    results: Any = torch.func.vjp(attention, *(inputs[i] for i in chosen))
    (_, lse), pull = results
    return pull((grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse))


def _check(
    given: Mapping[str, Any],
    options: AttentionOptions,
    saved: Mapping[str, Any] | None = None,
    always: bool = False,
) -> None:
    """Raise what `plan_attention` has to say, where the operators would not be reached to say it, or always."""
    everything = {**given, **(saved or {})}
    if not always and all(dispatches(x) or (x is None and name in OPTIONAL) for name, x in everything.items()):
        return
    present = {name: array for name, array in everything.items() if array is not None or name not in OPTIONAL}
    specs = {name: spec_of(name, array) if name in present else None for name, array in everything.items()}
    call = plan_attention.attention([specs[name] for name in given], options)
    if saved is not None:
        plan_attention.attention_backward(call, *(specs[name] for name in saved))


def _check_composed(inputs: tuple[Optional, ...], options: AttentionOptions, segments: Segments | None) -> None:
    """Raise what the operator would, which is not reached; of sizes that are symbols nothing is known yet."""
    given = dict(zip(("query", "key", "value", "attn_mask"), inputs, strict=True))
    if any(isinstance(n, torch.SymInt) for array in inputs if array is not None for n in array.shape):
        return
    specs = [None if array is None else spec_of(name, array) for name, array in given.items()]
    run_attention.check_variant(plan_attention.attention(specs, options, segments))


def _apply(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    ends_q: Any,
    ends_k: Any,
    options: AttentionOptions,
    return_lse: bool,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, Optional]:
    """Through the Function where something must be differentiated, otherwise straight to the operator.

    Forward mode needs the ``segments`` of packed sequences for its checks.
    """
    query, key, value, mask = under_autocast(query, key, value, mask)
    inputs = (query, key, value, mask, ends_q, ends_k)
    if has_tangents():
        _check_composed(inputs[:4], options, segments)
        return composition.attention(*inputs, options)
    tracked = torch.is_grad_enabled() and any(array is not None and array.requires_grad for array in inputs[:4])
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice, as in self-attention
        query, key, value, mask, ends_q, ends_k = (None if array is None else array.view_as(array) for array in inputs)
        inputs = (query, key, value, mask, ends_q, ends_k)
    if is_recorded():
        out, softmax, _ = torch.ops.l1attn.attention(*inputs, True, *options)
    elif tracked or is_transformed():
        out, softmax, _ = _Attention.run(*inputs, True, *options)
    else:
        out, softmax, _ = undifferentiated(operators_attention.attention, inputs, False, *options)
    return out, arrays.log_sum_exp(softmax) if return_lse else None


def attention(
    query: Any, key: Any, value: Any, mask: Any | None, options: AttentionOptions, return_lse: bool
) -> tuple[torch.Tensor, Optional]:
    """`l1attn_cupy.l1_attention` for torch tensors; lse may be None if it is not wanted."""
    if torch.compiler.is_compiling() and is_transformed():
        from . import uncompiled

        return uncompiled.forward_mode_or_transforms(attention, query, key, value, mask, options, return_lse)
    if not torch.compiler.is_compiling():
        _check({"query": query, "key": key, "value": value, "attn_mask": mask}, options)
    return _apply(query, key, value, mask, None, None, options, return_lse)


def attention_backward(
    given: Mapping[str, Any], saved: Mapping[str, Any], return_dmask: bool, options: AttentionOptions
) -> tuple[torch.Tensor, ...]:
    """`l1attn_cupy.l1_attention_backward` for torch tensors: all four gradients; not itself differentiable."""
    if not torch.compiler.is_compiling():
        _check(given, options, saved=saved, always=True)
        check_not_differentiated("l1_attention", (*given.values(), *saved.values()))
    mask = given["attn_mask"]
    plan_attention.check_dmask(None if mask is None else spec_of("attn_mask", mask), return_dmask)
    summed = "float64" if given["query"].dtype is torch.float64 else "float32"
    tensors = (saved["grad_out"], *given.values(), None, None, saved["out"])
    tensors = (*tensors, arrays.softmax_of(saved["lse"], summed), saved["grad_lse"])
    with torch.no_grad():
        return undifferentiated(
            operators_attention.attention_backward, tensors, True, True, True, return_dmask, *options
        )


def attention_varlen(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, options: AttentionOptions, return_lse: bool
) -> tuple[torch.Tensor, Optional]:
    """`l1attn_cupy.l1_attention_varlen` for torch tensors; lse may be None if it is not wanted."""
    given = {"query": query, "key": key, "value": value}
    segments = None
    if torch.compiler.is_compiling() and is_transformed():
        from . import uncompiled

        ends = cu_seqlens_q, cu_seqlens_k
        return uncompiled.forward_mode_or_transforms(attention_varlen, *given.values(), *ends, options, return_lse)
    if not torch.compiler.is_compiling():
        for name, array in given.items():
            plan_attention.check_packed(name, spec_of(name, array))
        cu_seqlens_q = arrays.integers("cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = arrays.integers("cu_seqlens_k", cu_seqlens_k)
        if has_tangents():
            segments = plan_attention.segments(cu_seqlens_q, cu_seqlens_k, len(query), len(key))
    ends_q, ends_k = torch.as_tensor(cu_seqlens_q), torch.as_tensor(cu_seqlens_k)
    q, k, v = (array.swapaxes(0, 1) for array in given.values())
    if not torch.compiler.is_compiling():
        _check({"query": q, "key": k, "value": v, "attn_mask": None}, options)
    out, lse = _apply(q, k, v, None, ends_q, ends_k, options, return_lse, segments)
    return out.swapaxes(0, 1), lse
