"""What `torch.compile` must leave alone.

Importing this imports torch's compiler, so it is imported only by code that is being compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_REASON = "l1attn_cupy: a compiled graph would lose tangents and transforms of torch.func; compile without fullgraph"
_KNOWN = inspect.signature(torch.compiler.disable).parameters  # releases before 2.8 take no reason


@torch.compiler.disable(**({"reason": _REASON} if "reason" in _KNOWN else {}))
def forward_mode_or_transforms(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function`` outside of the graph; where all must be one graph, torch raises an error instead."""
    return function(*arguments)
