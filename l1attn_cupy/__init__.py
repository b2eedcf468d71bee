"""L1 attention: scores that are a function of the Manhattan distance between query and key.

    >>> import numpy as np, l1attn_cupy as l1
    >>> query, key = np.zeros((1, 2), np.float32), np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)
    >>> l1.l1_scores(query, key, score="distance")
    array([[0., 3.]], dtype=float32)

Importing this package imports NumPy alone; Numba, torch and CuPy follow when a call needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .api import l1_scores, l1_scores_backward, show_config, variants
from .attention import l1_attention, l1_attention_backward, l1_attention_varlen
from .cpu.pages import free_all_blocks
from .quantize import quantize_for_l1

if TYPE_CHECKING:
    from .modules import L1MultiheadAttention as L1MultiheadAttention

__all__ = [
    "free_all_blocks",
    "l1_attention",
    "l1_attention_backward",
    "l1_attention_varlen",
    "l1_scores",
    "l1_scores_backward",
    "quantize_for_l1",
    "show_config",
    "variants",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for, and is not in ``__all__``."""
    if name != "L1MultiheadAttention":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import modules
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs torch ({error}): pip install 'l1attn_cupy[torch]'") from error
    return modules.L1MultiheadAttention


def __dir__() -> list[str]:
    return [*globals(), "L1MultiheadAttention"]
