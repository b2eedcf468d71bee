"""How the lab checks and times `attention_forward` and `attention_backward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import l1attn_cupy as l1

from .. import testing_attention
from ..cuda import registry
from ..cuda.registry import Variant
from ..testing import Agreement
from ..testing_attention import ExpectedAttention, Inputs
from .problem import Op, Problem, options, place, special


def _forward(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    if dtype in registry.BYTES.values():
        return _forward_quantized(variant, dtype, backend, problem)
    agreements = []
    for given, call in _calls(variant, dtype, problem):
        arrays = given.map(lambda x: place(x, backend, problem))[:4]
        results = [x.cpu() for x in l1.l1_attention(*arrays, return_lse=True, backend=backend, **call)]
        expected = ExpectedAttention(*given, **call)
        if problem.kind == "special":
            agreements += _specials(results, expected.exact_results)
        else:
            agreements += expected.results(*results)
    return agreements


def _forward_quantized(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    """NaN and infinity in query and key do not come to a kernel for bytes."""
    agreements = []
    problem = problem._replace(kind="ties") if problem.kind == "special" else problem
    for given, call in _calls(variant, "float32", problem):
        # One scale, as all batch dimensions meet.
        query, key, quant_scale = l1.quantize_for_l1(given.query, given.key, dtype=dtype)
        q, k, value, scales = (place(x, backend, problem) for x in (query, key, given.value, quant_scale))
        mask = None if given.mask is None else place(given.mask, backend, problem)
        results = l1.l1_attention(q, k, value, mask, quant_scale=scales, return_lse=True, backend=backend, **call)
        exact = {**call, "scale": call["scale"] * quant_scale.item()}
        expected = ExpectedAttention(query.float(), key.float(), given.value, given.mask, **exact)
        agreements += expected.results(*(x.cpu() for x in results))
    return agreements


def _backward(variant: Variant, dtype: str, backend: str, problem: Problem) -> list[Agreement]:
    """Of query, key and value, after a forward pass by the variant that calls get."""
    agreements = []
    for given, call in _calls(variant, dtype, problem):
        placed = given.map(lambda x: place(x, backend, problem))
        results = testing_attention.run(placed, backend=backend, **call)
        gradients = [gradient.cpu() for gradient in results[2:5]]
        expected = ExpectedAttention(*given, **call)
        if problem.kind == "special":
            agreements += _specials(gradients, expected.exact_gradients)
        else:
            agreements += expected.gradients(*gradients)
    return agreements


def _specials(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[Agreement]:
    return [special("result", *both) for both in zip(results, exact, strict=False)]


def _calls(variant: Variant, dtype: str, problem: Problem) -> Iterator[tuple[Inputs, dict[str, Any]]]:
    """Inputs and options: without a mask; and with one that is added, in a window, if there are keys to rule out."""
    length_q, length_k, channels = problem.sizes
    lead_q, lead_k = ((3, 1), (1, 2)) if problem.kind == "broadcast" else ((1,), (1,))
    shapes = (*lead_q, length_q, channels), (*lead_k, length_k, channels)
    channels_v = min(max(channels + 2, variant.limits.get("min_v", 0)), variant.limits.get("max_v", channels + 2))
    for mask, call in ((None, {}), (("added", (length_q, length_k)), {"window": (length_k // 2, 2)})):
        given = testing_attention.inputs(
            *shapes, channels_v, dtype, mask=mask, ties=problem.kind in ("ties", "special")
        )
        if problem.kind == "special":
            given = _with_specials(given)
        yield given, {**options(problem), **call}


def _with_specials(given: Inputs) -> Inputs:
    """A query with NaN, a key that is infinitely far away, and a value that is NaN, which a mask rules out for some."""
    query, key, value = (array.clone() for array in given[:3])
    query[..., 3, 2] = torch.nan
    key[..., 7, 1] = -torch.inf
    value[..., 9, 0] = torch.nan
    mask = given.mask
    if mask is not None:
        mask = mask.clone()
        mask[::2, 9] = -torch.inf
    return given._replace(query=query, key=key, value=value, mask=mask)


def _prepare_forward(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    of_bytes = dtype in registry.BYTES.values()
    query, key, value, *_ = _on_gpu("float32" if of_bytes else dtype, shape)
    if not of_bytes:
        return lambda: l1.l1_attention(query, key, value, variant=name)
    q, k, quant_scale = l1.quantize_for_l1(query, key, dtype=dtype)
    return lambda: l1.l1_attention(q, k, value, quant_scale=quant_scale, variant=name)


def _prepare_backward(name: str, dtype: str, shape: Sequence[int]) -> Callable[[], Any]:
    query, key, value, _, grad, _ = _on_gpu(dtype, shape)
    out, lse = l1.l1_attention(query, key, value, return_lse=True)
    return lambda: l1.l1_attention_backward(grad, query, key, value, out, lse, variant=name)


def _on_gpu(dtype: str, shape: Sequence[int]) -> Inputs:
    batch, length_q, length_k, channels = shape
    sizes = (batch, length_q, channels), (batch, length_k, channels)
    return testing_attention.inputs(*sizes, channels, dtype).to("cuda")


def _numbers_forward(shape: Sequence[int]) -> int:
    """Query, key, value, out."""
    batch, length_q, length_k, channels = shape
    return 2 * batch * channels * (length_q + length_k)


def _numbers_backward(shape: Sequence[int]) -> int:
    """The same, and the gradient of each."""
    return 2 * _numbers_forward(shape)


OPS = {
    "attention_forward": Op(_forward, _prepare_forward, _numbers_forward, 1, "forward"),
    "attention_backward": Op(_backward, _prepare_backward, _numbers_backward, 2, "backward"),
}
