"""The CUDA backend: launches on the caller's current stream, on the device of the arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import arrays
from ..plan import Plan
from . import calls, compiler
from .launch import Launch, Operand
from .registry import KernelError


class _Gpu:
    """One GPU, while it is the current device and the caller's stream the current stream."""

    def borrow(self, array: Any) -> tuple[int, Any]:
        view = arrays.borrow_cuda(array)
        return view.data.ptr, view

    def run(self, launch: Launch, operands: dict[str, Operand], written: set[str]) -> None:
        arguments = np.frombuffer(launch.arguments, dtype=np.dtype((np.void, len(launch.arguments))))
        compiler.kernel(launch)((launch.grid,), (launch.threads,), (arguments,))


def scores_forward(plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``."""
    with _current(plan, query):
        calls.scores_forward(_Gpu(), plan, query, key, out)


def scores_backward(plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any) -> None:
    """Write the gradients that are not None; ``saved`` is the forward result or None."""
    with _current(plan, query):
        calls.scores_backward(_Gpu(), plan, grad, query, key, saved, dquery, dkey)


@contextlib.contextmanager
def _current(plan: Plan, query: Any) -> Iterator[None]:
    """CuPy launches on the current device and stream: make them those of the arrays and of the caller."""
    try:
        import cupy
    except ImportError:
        raise KernelError(f"arrays on {plan.query.device} need CuPy: {compiler.missing()}") from None
    index = int(plan.query.device.partition(":")[2])
    with cupy.cuda.Device(index):
        if not arrays.is_torch(query):  # CuPy's current stream is the caller's
            yield
            return
        import torch

        with cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index):
            yield
