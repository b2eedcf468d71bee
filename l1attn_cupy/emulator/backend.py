"""The emulator as a backend: the CUDA kernels on CPU arrays, through the same registry, arguments and grid."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping
from typing import Any

from .. import arrays
from ..cuda import calls
from ..cuda.launch import Launch
from ..plan import ITEMSIZE, Plan
from .engine import EmulatedKernel, Region, compile_kernel

#: Decides in which order threads run between two barriers; each launch takes another, from a fixed start.
_seeds = itertools.count(int(os.environ.get("L1ATTN_EMULATOR_SEED", "0")))


def scores_forward(plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``."""
    calls.scores_forward(_run, plan, query, key, out)


def scores_quantized(plan: Plan, query: Any, key: Any, quant_scale: Any | None, out: Any) -> None:
    """Write the scores of 8-bit ``query`` and ``key`` to ``out``."""
    calls.scores_quantized(_run, plan, query, key, quant_scale, out)


def scores_backward(plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any) -> None:
    """Write the gradients that are not None; ``saved`` is the forward result or None."""
    calls.scores_backward(_run, plan, grad, query, key, saved, dquery, dkey)


def scores_jvp(
    plan: Plan, query: Any, key: Any, tangent_query: Any, tangent_key: Any, saved: Any | None, out: Any
) -> None:
    """Write the tangent of the scores to ``out``; ``saved`` is the forward result, or None where F' is constant."""
    calls.scores_jvp(_run, plan, query, key, tangent_query, tangent_key, saved, out)


def _run(launch: Launch, given: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    addresses = {name: arrays.address(array) for operands in (given, written) for name, array in operands.items()}
    memory = [_region(name, array, name in written) for name, array in {**given, **written}.items()]
    limit = float(os.environ.get("L1ATTN_EMULATOR_TIME_LIMIT", "600"))
    checked = os.environ.get("L1ATTN_EMULATOR_CHECK", "1") != "0"
    kernel = _kernel(launch.source, launch.variant.op, launch.defines, checked)
    arguments = bytes(launch.arguments(addresses))
    kernel.launch(
        launch.grid,
        launch.threads,
        arguments,
        shared_bytes=launch.shared,
        memory=memory,
        seed=next(_seeds),
        time_limit=limit,
    )


@functools.lru_cache(maxsize=512)
def _kernel(text: str, entry: str, defines: tuple[tuple[str, int], ...], checked: bool) -> EmulatedKernel:
    return compile_kernel(text, name=entry, defines=dict(defines), entry=entry, check=checked)


def _region(name: str, array: Any, written: bool) -> Region:
    """The bytes between the first and the last element of an array, whatever its strides."""
    spec, address = arrays.describe(array), arrays.address(array)
    itemsize = ITEMSIZE[spec.dtype]
    if 0 in spec.shape:
        return Region(address, 0, written, name)
    reach = [(n - 1) * stride for n, stride in zip(spec.shape, spec.strides, strict=True)]
    first, last = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    return Region(address + first * itemsize, (last - first + 1) * itemsize, written, name)
