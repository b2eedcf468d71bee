"""The CUDA backend: launches on the caller's current stream, on the device of the arrays."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..plan import Plan
from ..plan_attention import AttentionPlan
from . import calls, compiler
from .launch import Launch
from .registry import KernelError


def scores_forward(plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``."""
    device, machine = machine_of(plan, query)
    with device:
        calls.scores_forward(machine, plan, query, key, out)


def scores_quantized(plan: Plan, query: Any, key: Any, quant_scale: Any | None, out: Any) -> None:
    """Write the scores of 8-bit ``query`` and ``key`` to ``out``."""
    device, machine = machine_of(plan, query)
    with device:
        calls.scores_quantized(machine, plan, query, key, quant_scale, out)


def scores_backward(plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any) -> None:
    """Write the gradients that are not None; ``saved`` is the forward result or None."""
    device, machine = machine_of(plan, query)
    with device:
        calls.scores_backward(machine, plan, grad, query, key, saved, dquery, dkey)


def scores_jvp(
    plan: Plan, query: Any, key: Any, tangent_query: Any, tangent_key: Any, saved: Any | None, out: Any
) -> None:
    """Write the tangent of the scores to ``out``; ``saved`` is the forward result, or None where F' is constant."""
    device, machine = machine_of(plan, query)
    with device:
        calls.scores_jvp(machine, plan, query, key, tangent_query, tangent_key, saved, out)


def machine_of(plan: Plan | AttentionPlan, query: Any) -> tuple[contextlib.AbstractContextManager, calls.Machine]:
    """What makes the device of the arrays the current one, and what launches kernels there on the caller's stream."""
    try:
        import cupy
    except ImportError:
        raise KernelError(f"arrays on {plan.query.device} need CuPy: {compiler.missing()}") from None
    index = int(plan.query.device.partition(":")[2])
    is_current = cupy.cuda.runtime.getDevice() == index
    if arrays.is_torch(query):
        stream = _stream(index, sys.modules["torch"]._C._cuda_getCurrentRawStream(index))
    else:
        stream = cupy.cuda.get_current_stream(index)
    return _AS_IT_IS if is_current else cupy.cuda.Device(index), functools.partial(_run, index, stream)


#: Entering and leaving the current device would take as long as all that it is for.
_AS_IT_IS = contextlib.nullcontext()


@functools.lru_cache(maxsize=256)
def _stream(device: int, handle: int) -> Any:
    """CuPy's view of another library's stream; null is the default stream."""
    import cupy

    return cupy.cuda.ExternalStream(handle, device) if handle else cupy.cuda.Stream.null


def _run(device: int, stream: Any, launch: Launch, given: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Launch on a device that is the current one. The stream is not made the current one: that would take longer."""
    addresses = {name: arrays.address(array) for operands in (given, written) for name, array in operands.items()}
    arguments = launch.arguments(addresses)
    # CuPy passes a NumPy array by value: the bytes of the struct.
    packed = np.frombuffer(arguments, _bytes(len(arguments)))
    compiler.kernel(launch, device)(
        (launch.grid,), (launch.threads,), (packed,), shared_mem=launch.shared, stream=stream
    )


@functools.lru_cache(maxsize=64)
def _bytes(count: int) -> np.dtype:
    return np.dtype((np.void, count))
