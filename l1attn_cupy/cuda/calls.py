"""The ops in terms of launches, for whatever can launch kernels: a GPU or the emulator."""

from __future__ import annotations

from typing import Any, Protocol

from .. import arrays
from ..functions import CURVED
from ..plan import Plan
from . import launch
from .launch import Launch, Operand


class Machine(Protocol):
    """What runs kernels."""

    def borrow(self, array: Any) -> tuple[int, Any]:
        """Address of an array's first element, and what must stay alive meanwhile."""

    def run(self, launch: Launch, operands: dict[str, Operand], written: set[str]) -> None:
        """Run a launch that reads the operands, and writes those named in ``written``."""


def scores_forward(machine: Machine, plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``, which is not empty."""
    operands, _owners = _borrow(machine, query=query, key=key, out=out)
    variant = launch.pick("scores_forward", plan)
    call = launch.scores_forward(plan, variant, operands["query"], operands["key"], operands["out"])
    machine.run(call, operands, {"out"})


def scores_backward(
    machine: Machine, plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any
) -> None:
    """Write the gradients that are not None. The scores, if F' needs them and ``saved`` is None, are computed anew."""
    if saved is None and plan.options.score in CURVED:
        saved = arrays.empty(plan.out_shape, query)
        scores_forward(machine, plan, query, key, saved)
    variant = launch.pick("scores_backward", plan)
    wanted = {name: array for name, array in (("dquery", dquery), ("dkey", dkey)) if array is not None}
    results = {name: arrays.zeros_to_add_to(array) for name, array in wanted.items()} if variant.atomic else wanted
    given = {"grad": grad, "query": query, "key": key, "scores": grad if saved is None else saved}
    operands, _owners = _borrow(machine, **given, **results)
    call = launch.scores_backward(plan, variant, operands, operands.get("dquery"), operands.get("dkey"))
    if call is not None:
        machine.run(call, operands, set(results))
    if variant.atomic:
        for name, array in wanted.items():
            arrays.assign(array, results[name])


def _borrow(machine: Machine, **given: Any) -> tuple[dict[str, Operand], list[Any]]:
    """Operands with contiguous rows: an array whose last stride is not 1 is copied."""
    operands, owners = {}, []
    for name, array in given.items():
        rows = arrays.with_contiguous_rows(array)
        address, owner = machine.borrow(rows)
        operands[name] = Operand(address, arrays.describe(rows))
        owners += [rows, owner]
    return operands, owners
