"""The ops in terms of launches, for whatever can launch kernels: a GPU or the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .. import arrays
from ..functions import CURVED
from ..plan import Plan
from . import launch
from .launch import Launch


class Machine(Protocol):
    """What runs kernels: arrays by the names that the launch gives them, and which of them are written."""

    def __call__(self, launch: Launch, given: Mapping[str, Any], written: Mapping[str, Any]) -> None: ...


def scores_forward(machine: Machine, plan: Plan, query: Any, key: Any, out: Any) -> None:
    """Write the scores of ``query`` and ``key`` to ``out``, which is contiguous and not empty."""
    plan, query, key = _with_contiguous_rows(plan, query, key)
    machine(launch.scores_forward(plan), {"query": query, "key": key}, {"out": out})


def scores_quantized(machine: Machine, plan: Plan, query: Any, key: Any, quant_scale: Any | None, out: Any) -> None:
    """Write the scores of 8-bit ``query`` and ``key`` to ``out``, which is contiguous and not empty."""
    plan, query, key = _with_contiguous_rows(plan, query, key)
    given = {"query": query, "key": key} | ({} if quant_scale is None else {"quant_scale": quant_scale})
    machine(launch.scores_quantized(plan), given, {"out": out})


def scores_backward(
    machine: Machine, plan: Plan, grad: Any, query: Any, key: Any, saved: Any, dquery: Any, dkey: Any
) -> None:
    """Write the gradients that are not None. Scores that F' needs and that are not ``saved`` are computed again."""
    plan, query, key = _with_contiguous_rows(plan, query, key)
    if saved is None and plan.options.score in CURVED:
        saved = arrays.empty(plan.out_shape, query)
        machine(
            launch.scores_forward(plan._replace(options=plan.options._replace(variant=None))),
            {"query": query, "key": key},
            {"out": saved},
        )
    grad = arrays.with_contiguous_rows(grad)
    saved = grad if saved is None else arrays.with_contiguous_rows(saved)
    wanted = {name: array for name, array in (("dquery", dquery), ("dkey", dkey)) if array is not None}
    if not wanted:
        return
    call = launch.scores_backward(
        plan, arrays.describe(grad), arrays.describe(saved), dquery is not None, dkey is not None
    )
    given = {"query": query, "key": key, "grad": grad, "scores": saved}
    if not call.variant.atomic:
        machine(call, given, wanted)
        return
    sums = {name: arrays.zeros_to_add_to(array) for name, array in wanted.items()}
    machine(call, given, sums)
    for name, array in wanted.items():
        arrays.assign(array, sums[name])


def scores_jvp(
    machine: Machine,
    plan: Plan,
    query: Any,
    key: Any,
    tangent_query: Any,
    tangent_key: Any,
    saved: Any | None,
    out: Any,
) -> None:
    """Write the tangent of the scores to ``out``; ``saved`` is the forward result, or None where F' is constant.

    Kernels take scores in any case: then what lies in ``out``, of which nothing comes.
    """
    plan, query, key = _with_contiguous_rows(plan, query, key)
    tangent_query, tangent_key = map(arrays.with_contiguous_rows, (tangent_query, tangent_key))
    saved = out if saved is None else arrays.with_contiguous_rows(saved)
    call = launch.scores_jvp(plan, *map(arrays.describe, (tangent_query, tangent_key, saved)))
    given = {"query": query, "key": key, "tangent_query": tangent_query, "tangent_key": tangent_key, "scores": saved}
    machine(call, given, {"out": out})


def _with_contiguous_rows(plan: Plan, query: Any, key: Any) -> tuple[Plan, Any, Any]:
    """Copies of query and key where their last stride is not 1, and the plan for the copies."""
    q, k = arrays.with_contiguous_rows(query, plan.query), arrays.with_contiguous_rows(key, plan.key)
    if q is not query or k is not key:
        plan = plan._replace(query=arrays.describe(q), key=arrays.describe(k))
    return plan, q, k
