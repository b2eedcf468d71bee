"""L1 attention: scores that are a function of the Manhattan distance between query and key.

    >>> import numpy as np, l1attn_cupy as l1
    >>> query, key = np.zeros((1, 2), np.float32), np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)
    >>> l1.l1_scores(query, key, score="distance")
    array([[0., 3.]], dtype=float32)

Importing this package imports NumPy alone; Numba, torch and CuPy follow when a call needs them.
"""

from .api import l1_scores, l1_scores_backward, show_config, variants
from .attention import l1_attention, l1_attention_backward, l1_attention_varlen

__all__ = [
    "l1_attention",
    "l1_attention_backward",
    "l1_attention_varlen",
    "l1_scores",
    "l1_scores_backward",
    "show_config",
    "variants",
]
__version__ = "0.1.0"
