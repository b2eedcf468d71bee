"""L1 scores as PyTorch operators (``torch.ops.l1attn``) under a thin autograd Function.

The operators have a fake implementation each, so that `torch.compile` traces through them; the Function links forward
and backward. Checks happen in the operators, through `plan`, also while tracing.
"""

from __future__ import annotations

from typing import Any

import torch

from . import arrays, plan, run
from .plan import Plan

_library = torch.library.Library("l1attn", "DEF")  # noqa: TOR901 - lives as long as the process
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_OPTIONS = "str score, float scale, float eps, str? backend, str? variant"
_library.define(f"scores(Tensor query, Tensor key, {_OPTIONS}) -> Tensor", tags=_TAGS)
_library.define(
    "scores_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor? scores, bool need_query, bool need_key, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _plan(query: torch.Tensor, key: torch.Tensor, options: tuple) -> Plan:
    return plan.scores(arrays.describe(query), arrays.describe(key), *options)


def _scores(query: torch.Tensor, key: torch.Tensor, *options: Any) -> torch.Tensor:
    query, key = query.resolve_neg(), key.resolve_neg()
    return run.scores(_plan(query, key, options), query, key)


def _scores_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, query, key = grad.resolve_neg(), query.resolve_neg(), key.resolve_neg()
    call = _plan(query, key, options)
    gradients = run.scores_backward(call, grad, query, key, scores, need_query, need_key)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_scores(query: torch.Tensor, key: torch.Tensor, *options: Any) -> torch.Tensor:
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return query.new_empty(*batch, query.shape[-2], key.shape[-2])


def _fake_scores_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
    )


for _device in ("CPU", "CUDA"):
    _library.impl("scores", _scores, _device)
    _library.impl("scores_backward", _scores_backward, _device)
torch.library.register_fake("l1attn::scores", _fake_scores, lib=_library)
torch.library.register_fake("l1attn::scores_backward", _fake_scores_backward, lib=_library)


class _Scores(torch.autograd.Function):
    """Saves query, key and the scores: the derivative of F is a function of the scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, options: tuple) -> torch.Tensor:
        scores = torch.ops.l1attn.scores(query, key, *options)
        ctx.save_for_backward(query, key, scores)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if grad is None:
            return None, None, None
        query, key, scores = ctx.saved_tensors
        need_query, need_key = ctx.needs_input_grad[:2]
        dquery, dkey = torch.ops.l1attn.scores_backward(
            grad, query, key, scores, need_query, need_key, *ctx.options
        )
        return dquery if need_query else None, dkey if need_key else None, None


def l1_scores(
    query: Any, key: Any, score: str, scale: float, eps: float, backend: str | None, variant: str | None
) -> torch.Tensor:
    """`l1attn_cupy.l1_scores` for torch tensors."""
    if not torch.compiler.is_compiling():
        query, key = arrays.accept("query", query), arrays.accept("key", key)
        _plan(query, key, (score, scale, eps, backend, variant))
    return _Scores.apply(query, key, (score, float(scale), float(eps), backend, variant))
