"""Fused attention on the backend "cuda"; see `backend`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plan_attention import AttentionPlan, Saved
from ..plan_quantized import Quantized
from . import calls_attention
from .backend import machine_of


def attention_forward(
    plan: AttentionPlan, query: Any, key: Any, value: Any, mask: Any | None, out: Any, softmax: Any
) -> None:
    """Write ``out``, in its dtype, and ``softmax``."""
    device, machine = machine_of(plan, query)
    with device:
        given = {"query": query, "key": key, "value": value, "mask": mask}
        calls_attention.attention_forward(machine, plan, given, out, softmax)


def attention_quantized(
    plan: AttentionPlan,
    quantized: Quantized,
    given: tuple[Any, Any, Any, Any | None, Any | None],
    out: Any,
    softmax: Any,
) -> None:
    """The same from 8-bit query and key: ``given`` is query, key, value, mask and quant_scale."""
    device, machine = machine_of(plan, given[0])
    with device:
        calls_attention.attention_quantized(machine, plan, given, out, softmax)


def attention_backward(plan: AttentionPlan, saved: Saved, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Write ``wanted``, of dquery, dkey and dvalue, from ``given``."""
    device, machine = machine_of(plan, given["query"])
    with device:
        calls_attention.attention_backward(machine, plan, given, wanted)
