"""Fused attention on the backend "emulator"; see `backend`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cuda import calls_attention
from ..plan_attention import AttentionPlan, Saved
from ..plan_quantized import Quantized
from .backend import _run


def attention_forward(
    plan: AttentionPlan, query: Any, key: Any, value: Any, mask: Any | None, out: Any, softmax: Any
) -> None:
    """Write ``out``, in its dtype, and ``softmax``."""
    given = {"query": query, "key": key, "value": value, "mask": mask}
    calls_attention.attention_forward(_run, plan, given, out, softmax)


def attention_quantized(
    plan: AttentionPlan,
    quantized: Quantized,
    given: tuple[Any, Any, Any, Any | None, Any | None],
    out: Any,
    softmax: Any,
) -> None:
    """The same from 8-bit query and key: ``given`` is query, key, value, mask and quant_scale."""
    calls_attention.attention_quantized(_run, plan, given, out, softmax)


def attention_backward(plan: AttentionPlan, saved: Saved, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Write ``wanted``, of dquery, dkey and dvalue, from ``given``."""
    calls_attention.attention_backward(_run, plan, given, wanted)
