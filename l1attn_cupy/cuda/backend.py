"""The CUDA backend: launches on the caller's current stream, on the device of the arrays."""

from __future__ import annotations

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
    device, stream = _current(plan, query)
    with device, stream:
        calls.scores_forward(_run, plan, query, key, out)


def scores_quantized(plan: Plan, query: Any, key: Any, quant_scale: Any | None, out: Any) -> None:
    """Write the scores of 8-bit ``query`` and ``key`` to ``out``."""
    device, stream = _current(plan, query)
    with device, stream:
        calls.scores_quantized(_run, plan, query, key, quant_scale, out)


def scores_backward(plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any) -> None:
    """Write the gradients that are not None; ``saved`` is the forward result or None."""
    device, stream = _current(plan, query)
    with device, stream:
        calls.scores_backward(_run, plan, grad, query, key, saved, dquery, dkey)


def scores_jvp(
    plan: Plan, query: Any, key: Any, tangent_query: Any, tangent_key: Any, saved: Any | None, out: Any
) -> None:
    """Write the tangent of the scores to ``out``; ``saved`` is the forward result, or None where F' is constant."""
    device, stream = _current(plan, query)
    with device, stream:
        calls.scores_jvp(_run, plan, query, key, tangent_query, tangent_key, saved, out)


def _run(launch: Launch, given: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    addresses = {name: arrays.address(array) for operands in (given, written) for name, array in operands.items()}
    arguments = launch.arguments(addresses)
    # CuPy passes a NumPy array by value: the bytes of the struct.
    packed = np.frombuffer(arguments, np.dtype((np.void, len(arguments))))
    compiler.kernel(launch)((launch.grid,), (launch.threads,), (packed,))


def _current(plan: Plan | AttentionPlan, query: Any) -> tuple[Any, Any]:
    """CuPy's device and stream to enter: those of the arrays, and of the caller."""
    try:
        import cupy
    except ImportError:
        raise KernelError(f"arrays on {plan.query.device} need CuPy: {compiler.missing()}") from None
    index = int(plan.query.device.partition(":")[2])
    if not arrays.is_torch(query):
        return cupy.cuda.Device(index), cupy.cuda.get_current_stream(index)
    return cupy.cuda.Device(index), _stream(index, sys.modules["torch"].cuda.current_stream(index).cuda_stream)


@functools.lru_cache(maxsize=256)
def _stream(device: int, handle: int) -> Any:
    """CuPy's view of another library's stream; null is the default stream."""
    import cupy

    return cupy.cuda.ExternalStream(handle, device) if handle else cupy.cuda.Stream.null
