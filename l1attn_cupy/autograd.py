"""L1 scores in PyTorch's autograd: thin Functions around the operators of `operators`, which call one another.

`plan` checks the types of options before an operator is called, except while tracing, and all else in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import (
    arrays,
    operators,  # defines torch.ops.l1attn
    plan,
)
from .functions import CURVED

# Each of the three operators is differentiated by the three. Where F is straight, each is linear in what is not query
# or key, and constant in these but at ties. Where it is curved, its change adds, with the tangent of the scores along
# the cotangents or tangents of query and key,
#
#     dquery, dkey of "distance" with the gradient   grad * tangent * F'' / F' * scale
#
# F'' / F' is -2 * score for "inverse" and -1 for "laplacian".


class Differentiable(torch.autograd.Function):
    """What all our Functions share: the fast form, with ``ctx`` in `forward`, that `torch.compile` can trace.

    torch.func takes only another form, whose call costs 20 us more, and forward mode a method that Dynamo refuses:
    they are in the subclass that `in_both_forms` makes.
    """

    @staticmethod
    def compute(*inputs: Any) -> Any:
        """The results."""
        raise NotImplementedError

    @staticmethod
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        """Save what derivatives need."""
        raise NotImplementedError

    @classmethod
    def run(cls, *inputs: Any) -> Any:
        """The result, by the form that the caller needs."""
        return cls.composable.apply(*inputs) if is_transformed() else cls.apply(*inputs)  # type: ignore[attr-defined]

    @classmethod
    def differentiates(cls, name: str) -> None:
        """Makes this the derivative of an operator that is called by its name, as in a graph from `torch.export`."""
        operator = getattr(torch.ops.l1attn, name)

        def kernel(*inputs: Any) -> Any:
            tracked = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs) and torch.is_grad_enabled()
            if not tracked and not (has_tangents() and torch._C._is_fwd_grad_enabled()):
                with torch._C._AutoDispatchBelowAutograd():
                    return operator(*inputs)
            if torch._C._are_functorch_transforms_active():
                plan.operator_in_transform(name)
            return cls.run(*inputs)

        operators.library.impl(name, kernel, "Autograd")


def undifferentiated(function: Callable[..., Any], tensors: tuple, *rest: Any) -> Any:
    """``function(*tensors, *rest)``, one of `operators`: by the operator of its name where torch sees to something.

    Elsewhere the operator would only cost time.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return getattr(torch.ops.l1attn, function.__name__)(*tensors, *rest)
    if _goes_unseen(tensors):
        return function(*tensors, *rest)
    with torch._C._AutoDispatchBelowAutograd():  # without the detour by `Differentiable.differentiates`
        return getattr(torch.ops.l1attn, function.__name__)(*tensors, *rest)


def _goes_unseen(tensors: tuple) -> bool:
    """Whether nobody watches the calls of operators, and all tensors are what they seem."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and _is_dense(torch._C._dispatch_keys(tensor))):
            return False
    return True


#: Types whose operators are called as they are.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

#: What the dispatcher goes by for a tensor that is a piece of memory with its numbers. Others stand for zeros, or for a
#: batch in `vmap`, or have their numbers in memory with the other sign, which the dispatcher sees to.
_DENSE_KEYS = frozenset(
    "DispatchKeySet CPU CUDA ADInplaceOrView AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA".split()
)
_known_keys: dict[int, bool] = {}


def _is_dense(keys: Any) -> bool:
    number = keys.raw_repr()
    if number not in _known_keys:
        _known_keys[number] = _DENSE_KEYS.issuperset(re.findall(r"\w+", str(keys)))
    return _known_keys[number]


def in_both_forms(cls: type[Differentiable]) -> type[Differentiable]:
    """Adds the form of ``cls`` that composes with vmap, grad and jvp, as ``cls.composable``.

    Its tangents are those of ``cls.tangent``; torch raises an error where there is none.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = cls.compute(*inputs)
        cls.setup(ctx, inputs, output)
        return output

    methods = {
        "forward": staticmethod(cls.compute),
        "setup_context": staticmethod(cls.setup),
        "generate_vmap_rule": True,
    }
    if hasattr(cls, "tangent"):
        methods["jvp"] = staticmethod(cls.tangent)
    cls.composable = type(f"{cls.__name__}Composable", (cls,), methods)  # type: ignore[attr-defined]
    cls.forward = staticmethod(forward)  # type: ignore[method-assign]
    return cls


@in_both_forms
class _Scores(Differentiable):
    """Saves query, key and, where F is curved, the scores: its derivative is a function of them."""

    @staticmethod
    def compute(query: torch.Tensor, key: torch.Tensor, *options: Any) -> torch.Tensor:
        return undifferentiated(operators.scores, (query, key), *options)

    @staticmethod
    def setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        query, key, *options = inputs
        saved = output if options[0] in CURVED else None
        ctx.save_for_backward(query, key, saved)
        ctx.save_for_forward(query, key, saved)
        ctx.options = tuple(options)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        query, key, scores = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        dquery, dkey = _backward(grad, query, key, scores, needed[0], needed[1], ctx.options)
        return dquery if needed[0] else None, dkey if needed[1] else None, *(None,) * 5

    @staticmethod
    def tangent(
        ctx: Any, tangent_q: torch.Tensor | None, tangent_k: torch.Tensor | None, *_: Any
    ) -> torch.Tensor | None:
        query, key, scores = ctx.saved_tensors
        return _jvp(query, key, tangent_q, tangent_k, scores, ctx.options)


@in_both_forms
class _ScoresBackward(Differentiable):
    """The gradients as a function of grad, query and key, of which the scores are but a function."""

    @staticmethod
    def compute(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        scores: torch.Tensor | None,
        need_query: bool,
        need_key: bool,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rest = (need_query, need_key, *of_backward(options, "scores_backward"))
        return undifferentiated(operators.scores_backward, (grad, query, key, scores), *rest)

    @staticmethod
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        arrays_given, (need_query, need_key, *options) = inputs[:4], inputs[4:]
        ctx.save_for_backward(*arrays_given)
        ctx.save_for_forward(*arrays_given)
        ctx.needed, ctx.options = (need_query, need_key), tuple(options)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
        grad, query, key, scores = ctx.saved_tensors
        u_query, u_key = (u if need else None for u, need in zip(cotangents, ctx.needed, strict=True))
        along = _jvp(query, key, u_query, u_key, scores, ctx.options)
        dquery, dkey = None, None
        if along is not None and any(ctx.needs_input_grad[1:3]):
            dquery, dkey = _curvature(grad * along, query, key, scores, ctx.needs_input_grad[1:3], ctx.options)
        return along if ctx.needs_input_grad[0] else None, dquery, dkey, *(None,) * 8

    @staticmethod
    def tangent(
        ctx: Any, tangent: torch.Tensor | None, tangent_q: torch.Tensor | None, tangent_k: torch.Tensor | None, *_: Any
    ) -> tuple:
        grad, query, key, scores = ctx.saved_tensors
        total: list[Any] = [None, None]
        if tangent is not None:
            total = list(_backward(tangent, query, key, scores, ctx.needed[0], ctx.needed[1], ctx.options))
        along = _jvp(query, key, tangent_q, tangent_k, scores, ctx.options)
        if along is not None:
            more = _curvature(grad * along, query, key, scores, ctx.needed, ctx.options)
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, more, strict=True)]
        like = (query, key)
        zeros = (x.new_zeros(x.shape if need else 0) for x, need in zip(like, ctx.needed, strict=True))
        return tuple(zero if x is None else x for x, zero in zip(total, zeros, strict=True))


@in_both_forms
class _ScoresJvp(Differentiable):
    """The tangent of the scores as a function of query, key and their tangents."""

    @staticmethod
    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        tangent_q: torch.Tensor,
        tangent_k: torch.Tensor,
        scores: torch.Tensor | None,
        *options: Any,
    ) -> torch.Tensor:
        tensors = (query, key, tangent_q, tangent_k, scores)
        return undifferentiated(operators.scores_jvp, tensors, *of_backward(options, "scores_jvp"))

    @staticmethod
    def setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        query, key, _, _, scores, *options = inputs
        ctx.save_for_backward(query, key, scores, output)
        ctx.save_for_forward(query, key, scores, output)
        ctx.options = tuple(options)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 10
        query, key, scores, along = ctx.saved_tensors
        needed = ctx.needs_input_grad
        dquery, dkey = _curvature(grad * along, query, key, scores, needed[:2], ctx.options)
        of_tangents: tuple = (None, None)
        if any(needed[2:4]):
            of_tangents = _backward(grad, query, key, scores, needed[2], needed[3], ctx.options)
        of_tangents = tuple(x if need else None for x, need in zip(of_tangents, needed[2:4], strict=True))
        return dquery, dkey, *of_tangents, *(None,) * 6

    @staticmethod
    def tangent(ctx: Any, tangent_q: Any, tangent_k: Any, second_q: Any, second_k: Any, *_: Any) -> torch.Tensor | None:
        query, key, scores, along = ctx.saved_tensors
        found = _jvp(query, key, second_q, second_k, scores, ctx.options)
        if ctx.options[0] in CURVED:
            straight = ("distance", 1.0, *ctx.options[2:])
            turned = _jvp(query, key, tangent_q, tangent_k, None, straight)
            if turned is not None:
                bent = along * turned * _bend(query, key, scores, ctx.options)
                found = bent if found is None else found + bent
        return torch.zeros_like(along) if found is None else found


_Scores.differentiates("scores")
_ScoresBackward.differentiates("scores_backward")
_ScoresJvp.differentiates("scores_jvp")


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor | None,
    need_query: bool,
    need_key: bool,
    options: tuple,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients, differentiable where somebody may differentiate them: with ``create_graph``, and in torch.func."""
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return _ScoresBackward.compute(grad, query, key, scores, need_query, need_key, *options)
    if is_tracked():
        return _ScoresBackward.run(grad, query, key, _constant(scores), need_query, need_key, *options)
    return _ScoresBackward.compute(grad, query, key, scores, need_query, need_key, *options)


def _jvp(
    query: torch.Tensor,
    key: torch.Tensor,
    tangent_q: torch.Tensor | None,
    tangent_k: torch.Tensor | None,
    scores: torch.Tensor | None,
    options: tuple,
) -> torch.Tensor | None:
    """The tangent of the scores; None if there is none of query and key."""
    if tangent_q is None and tangent_k is None:
        return None
    tangent_q = torch.zeros_like(query) if tangent_q is None else tangent_q
    tangent_k = torch.zeros_like(key) if tangent_k is None else tangent_k
    return _ScoresJvp.run(query, key, tangent_q, tangent_k, _constant(scores), *options)


def _bend(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor | None, options: tuple) -> torch.Tensor | float:
    """``F'' / F' * scale`` of a curved F."""
    name, scale, *_ = options
    return -scale if name == "laplacian" else -2 * scale * _again(query, key, scores, options)


def _again(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor | None, options: tuple) -> torch.Tensor:
    """The scores, as a function of query and key where that may matter to a derivative of still higher order."""
    if scores is None or is_tracked():
        return _Scores.run(query, key, *options)
    return scores


def _curvature(
    weight: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor | None,
    needed: Sequence[bool],
    options: tuple,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What F'' contributes to gradients, ``weight`` being the gradient times the tangent of the scores."""
    if options[0] not in CURVED or not any(needed):
        return None, None
    turned = weight * _bend(query, key, scores, options)
    gradients = _backward(turned, query, key, None, needed[0], needed[1], ("distance", 1.0, *options[2:]))
    dquery, dkey = (x if need else None for x, need in zip(gradients, needed, strict=True))
    return dquery, dkey


def _constant(scores: torch.Tensor | None) -> torch.Tensor | None:
    return None if scores is None else scores.detach()


def has_tangents() -> bool:
    """Whether there may be tangents, of forward mode."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether there may be tangents, or a transform of torch.func, within which ``requires_grad`` does not tell all."""
    return has_tangents() or torch._C._are_functorch_transforms_active()


def check_not_differentiated(name: str, given: Iterable[Any]) -> None:
    """Raise where a transform of torch.func differentiates the backward function of ``name``: it would get zeros."""
    tensors = (x for x in given if isinstance(x, torch.Tensor))
    if is_transformed() and any(is_differentiated(x, by_autograd=False) for x in tensors):
        raise NotImplementedError(
            f"{name}_backward cannot be differentiated, and an argument of it is by torch.func; differentiate {name} "
            "twice instead, or detach() the arguments"
        )


def is_differentiated(tensor: torch.Tensor, by_autograd: bool = True) -> bool:
    """Whether forward mode or a transform of torch.func differentiates by ``tensor``, or autograd if that counts.

    Also by one that `torch.func.vmap` has wrapped in it.
    """
    functorch = torch._C._functorch
    tracked = tensor.requires_grad and torch.is_grad_enabled()
    if tracked and (by_autograd or functorch.is_gradtrackingtensor(tensor)):
        return True
    compiled = torch.compiler.is_compiling()  # there nothing is wrapped
    batched = not compiled and functorch.is_batchedtensor(tensor)  # whose tangent is that of what it wraps
    may_have_tangent = has_tangents() and not batched and tensor.is_floating_point()
    if may_have_tangent and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    wrapped = not compiled and functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped and is_differentiated(functorch.get_unwrapped(tensor), by_autograd)


def is_batch(tensor: torch.Tensor) -> bool:
    """Whether it stands for a batch that ``is_grads_batched`` of `torch.autograd.grad` maps over."""
    return "Batched" in str(torch._C._dispatch_keys(tensor))


def is_recorded() -> bool:
    """Whether `torch.jit.trace` records operators; of a Function it would record what no process could run again."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_tracked() -> bool:
    """Whether somebody may differentiate what is computed now."""
    return torch.is_grad_enabled() or is_transformed()


def of_backward(options: tuple, op: str) -> tuple:
    """The options of the forward for another op, without a variant that this op does not have."""
    *shared, variant = options
    if variant is not None:
        from .cuda import registry

        if variant not in {known.name for known in registry.variants(op)}:
            variant = None
    return *shared, variant


def dispatches(array: Any) -> bool:
    """Whether the operators take ``array``, so that they will do the rest of the checks."""
    return (
        isinstance(array, torch.Tensor)
        and array.layout is torch.strided
        and not array.is_nested
        and not array.is_quantized
        and (array.is_cpu or array.is_cuda)
    )


def spec_of(name: str, array: Any) -> plan.ArraySpec:
    """Of any array, so that `plan` may say which one is not a tensor."""
    return arrays.describe(arrays.accept(name, array))


def l1_scores(
    query: Any, key: Any, score: str, scale: float, eps: float, backend: str | None, variant: str | None
) -> torch.Tensor:
    """`l1attn_cupy.l1_scores` for torch tensors."""
    options = (score, scale, eps, backend, variant)
    if not torch.compiler.is_compiling():
        options = plan.option_types(*options)
        if not (dispatches(query) and dispatches(key)):
            plan.scores(spec_of("query", query), spec_of("key", key), *options)
    elif is_transformed():
        from . import uncompiled

        return uncompiled.forward_mode_or_transforms(l1_scores, query, key, *options)
    else:  # the operator refuses any other
        plan.check_not_bool("scale", scale)
        plan.check_not_bool("eps", eps)
    if key is query and torch.compiler.is_compiling():  # Dynamo takes no tensor twice in an autograd Function
        key = query.view_as(query)
    query, key = under_autocast(query, key)
    if is_recorded():
        return torch.ops.l1attn.scores(query, key, *options)
    if is_transformed() or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _Scores.run(query, key, *options)
    return undifferentiated(operators.scores, (query, key), *options)


def under_autocast(query: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """In autocast's dtype, where it is on, as torch's own attention is; float64 stays."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return [query, *others]
    dtype = torch.get_autocast_dtype(kind)
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype is not torch.float64 else x
        for x in (query, *others)
    ]


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
        check_not_differentiated("l1_scores", (grad, query, key, scores))
        if not all(map(dispatches, (grad, query, key) if scores is None else (grad, query, key, scores))):
            call = plan.scores(spec_of("query", query), spec_of("key", key), *options)
            saved = None if scores is None else spec_of("scores", scores)
            plan.scores_backward(call, spec_of("grad_scores", grad), saved)
    with torch.no_grad():
        return undifferentiated(operators.scores_backward, (grad, query, key, scores), True, True, *options)
