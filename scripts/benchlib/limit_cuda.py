"""The GPU's own limit, in the form in which a contest samples it."""

from __future__ import annotations

from benchlib.timing import Elapsed
from l1attn_cupy.lab import gpu
from l1attn_cupy.lab.gpu import HAS_LIMIT

__all__ = ["HAS_LIMIT", "CudaLimit"]


class CudaLimit(gpu.CudaLimit):
    """Terms per second of one op and dtype with operands in registers."""

    def sample(self) -> Elapsed:
        """Seconds of 1e9 terms, from one launch."""
        return Elapsed(self.seconds_per_1e9_terms())
