"""What a device is called in tuning files: the name of the card, and its architecture."""

from __future__ import annotations

import functools
import os


def names(backend: str, device: str) -> tuple[str, ...]:
    """Names under which parameters for ``device`` ("cuda:0") may be found, the most particular first.

    A CUDA device has that of the card and of its architecture: ``("NVIDIA H200", "sm_90")``. The emulator has none,
    unless the environment variable L1ATTN_EMULATOR_DEVICE lends it some ("NVIDIA H200" or "NVIDIA H200,sm_90").
    """
    if backend == "cuda":
        return _cuda_names(int(device.partition(":")[2]))
    lent = os.environ.get("L1ATTN_EMULATOR_DEVICE", "")
    return tuple(name.strip() for name in lent.split(",") if name.strip())


@functools.lru_cache(maxsize=64)
def _cuda_names(index: int) -> tuple[str, ...]:
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    return name, f"sm_{cupy.cuda.Device(index).compute_capability}"
