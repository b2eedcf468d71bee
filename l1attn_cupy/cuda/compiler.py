"""From CUDA C text to a kernel that can be launched: CuPy's RawModule, its cache, and its errors in clear words."""

from __future__ import annotations

import functools
from typing import Any

from .launch import Launch
from .registry import KernelError

OPTIONS = ("-std=c++17", "-ftz=true")


def missing() -> str:
    """Why CUDA cannot be used here, and what to install; "" if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): pip install 'l1attn_cupy[cuda12]' or 'l1attn_cupy[cuda13]'"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "there is no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device can be used ({error}): check the NVIDIA driver with nvidia-smi"
    return ""


def kernel(launch: Launch, device: int) -> Any:
    """The compiled kernel of ``launch`` for the current device, compiled at most once for each text of its file."""
    return _compile(launch.source, launch.variant.op, launch.defines, device)


@functools.lru_cache(maxsize=512)
def _compile(text: str, entry: str, defines: tuple[tuple[str, int], ...], device: int) -> Any:
    import cupy

    options = OPTIONS + tuple(f"-D{name}={value}" for name, value in defines)
    try:
        return cupy.RawModule(code=text, options=options, backend="nvrtc").get_function(entry)
    except cupy.cuda.compiler.CompileException as error:
        architecture = cupy.cuda.Device(device).compute_capability
        raise KernelError(
            f"the kernel {entry} does not compile for sm_{architecture} with {' '.join(options)}:\n{error}"
        ) from None
    except cupy.cuda.driver.CUDADriverError as error:
        raise KernelError(
            f"the kernel has no entry point 'extern \"C\" __global__ void {entry}(...)': {error}"
        ) from None
    except (ImportError, RuntimeError, OSError) as error:
        raise KernelError(
            f"CuPy cannot compile CUDA code here: {error}. NVRTC and the CUDA headers come with "
            "pip install 'l1attn_cupy[cuda12]' or 'l1attn_cupy[cuda13]'; the kernel cache is CUPY_CACHE_DIR"
        ) from error
