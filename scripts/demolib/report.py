"""How the demonstrations print numbers over several seeds."""

from __future__ import annotations

from collections.abc import Sequence


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Mean, lowest and highest: "1.50 (1.00 to 2.00)"."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
