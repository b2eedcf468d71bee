"""L1 scores as PyTorch operators (``torch.ops.l1attn``) under a thin autograd Function.

The operators have a fake implementation each, so that `torch.compile` traces through them; the Function links forward
and backward. `plan` checks the types of options before an operator is called, except while tracing, and all else in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from . import arrays, plan, run
from .functions import CURVED
from .plan import Plan

_library = torch.library.Library("l1attn", "DEF")  # lives as long as the process
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_OPTIONS = "str score, float scale, float eps, str? backend, str? variant"
_library.define(f"scores(Tensor query, Tensor key, {_OPTIONS}) -> Tensor", tags=_TAGS)
_library.define(
    "scores_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor? scores, bool need_query, bool need_key, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _plan(query: torch.Tensor, key: torch.Tensor, options: tuple) -> Plan:
    return plan.cached_scores(arrays.describe(query), arrays.describe(key), *options)


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
    scores = None if scores is None else scores.resolve_neg()
    call = _plan(query, key, options)
    dquery, dkey = run.scores_backward(call, grad, query, key, scores, need_query, need_key)
    return query.new_empty(0) if dquery is None else dquery, key.new_empty(0) if dkey is None else dkey


def _fake_scores(query: torch.Tensor, key: torch.Tensor, *options: Any) -> torch.Tensor:
    for name, array in (("query", query), ("key", key)):
        if array.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions (..., length, head_dim), got {tuple(array.shape)}"
            )
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
    """Saves query, key and, where F is curved, the scores: its derivative is a function of them."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, options: tuple) -> torch.Tensor:
        scores = torch.ops.l1attn.scores(query, key, *options)
        ctx.save_for_backward(query, key, scores if options[0] in CURVED else None)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if grad is None:
            return None, None, None
        query, key, scores = ctx.saved_tensors
        need_query, need_key = ctx.needs_input_grad[:2]
        with torch.no_grad():
            dquery, dkey = torch.ops.l1attn.scores_backward(
                grad, query, key, scores, need_query, need_key, *_of_backward(ctx.options)
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dquery, dkey = (_NotDifferentiable.apply(array, grad, query, key) for array in (dquery, dkey))
        return dquery if need_query else None, dkey if need_key else None, None


def _of_backward(options: tuple, op: str = "scores_backward") -> tuple:
    """The options of the forward, without a variant that only the forward has."""
    *shared, variant = options
    if variant is not None:
        from .cuda import registry

        if variant not in {known.name for known in registry.variants(op)}:
            variant = None
    return *shared, variant


class _NotDifferentiable(torch.autograd.Function):
    """Passes a gradient on, and raises when it is itself differentiated.

    Torch's ``once_differentiable`` does so only if the incoming gradient requires a gradient. In a gradient penalty it
    does not, and the term that goes through query and key would be missing without a word.
    """

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "the gradient of l1_scores cannot be differentiated: its double backward is not built yet"
        )


def _dispatches(array: Any) -> bool:
    """Whether the operators take ``array``, so that they will do the rest of the checks."""
    return (
        isinstance(array, torch.Tensor)
        and array.layout is torch.strided
        and not array.is_nested
        and not array.is_quantized
        and array.device.type in ("cpu", "cuda")
    )


def _spec(name: str, array: Any) -> plan.ArraySpec:
    """Of any array, so that `plan` may say which one is not a tensor."""
    return arrays.describe(arrays.accept(name, array))


def l1_scores(
    query: Any, key: Any, score: str, scale: float, eps: float, backend: str | None, variant: str | None
) -> torch.Tensor:
    """`l1attn_cupy.l1_scores` for torch tensors."""
    options = (score, scale, eps, backend, variant)
    if not torch.compiler.is_compiling():
        options = plan.option_types(*options)
        if not (_dispatches(query) and _dispatches(key)):
            plan.scores(_spec("query", query), _spec("key", key), *options)
    if key is query and torch.compiler.is_compiling():  # Dynamo takes no tensor twice in an autograd Function
        key = query.view_as(query)
    tracked = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if tracked or forward_ad._current_level >= 0:  # the Function refuses tangents, the operator would drop them
        return _Scores.apply(query, key, options)
    return torch.ops.l1attn.scores(query, key, *options)


def l1_scores_backward(
    grad: Any,
    query: Any,
    key: Any,
    scores: Any | None,
    score: str,
    scale: float,
    eps: float,
    backend: str | None,
    variant: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`l1attn_cupy.l1_scores_backward` for torch tensors; not itself differentiable."""
    options = (score, scale, eps, backend, variant)
    if not torch.compiler.is_compiling():
        options = plan.option_types(*options)
        if not all(map(_dispatches, (grad, query, key) if scores is None else (grad, query, key, scores))):
            call = plan.scores(_spec("query", query), _spec("key", key), *options)
            saved = None if scores is None else _spec("scores", scores)
            plan.scores_backward(call, _spec("grad_scores", grad), saved)
    with torch.no_grad():
        return torch.ops.l1attn.scores_backward(grad, query, key, scores, True, True, *options)
