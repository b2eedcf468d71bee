"""A clock for kernels on a GPU, and the GPU's own limit: fadd_limit.cu, compiled by CuPy, timed by CUDA events.

Everything runs on torch's current stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

THREADS, BLOCKS_PER_SM, PASSES, WARM_UP = 256, 8, 20, 3  # a millisecond or two a launch
OVERWRITES = 6
# bfloat16 is summed in float32
TERM_TYPE = {"float32": 1, "bfloat16": 1, "float16": 2, "float64": 3, "int8": 4, "uint8": 4}
HAS_LIMIT = {"forward": set(TERM_TYPE), "backward": {"float32", "bfloat16", "float16"}}


class CudaClock:
    """CUDA events on the current stream; the L2 cache is overwritten before every call.

    It is overwritten again and again, for about a millisecond: meanwhile the host queues the call, and its time stays
    out.
    """

    def __init__(self) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self.scratch = torch.empty(max(8 * l2_bytes, 512 << 20), dtype=torch.uint8, device="cuda")

    def before_call(self) -> None:
        for _ in range(OVERWRITES):
            self.scratch.zero_()

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two stamps, once the second has been reached."""
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written together, of a copy within the GPU's memory: the best of five."""
        half = self.scratch.numel() // 2
        times = []
        for _ in range(5):
            start = self.stamp()
            self.scratch[:half].copy_(self.scratch[half : 2 * half])
            times.append(self.seconds(start, self.stamp()))
        return 2 * half / min(times)


class CudaLimit:
    """Terms per second of one op and dtype with operands in registers; a half2 is two terms, a word of bytes four."""

    def __init__(self, op: str, dtype: str) -> None:
        import cupy
        import numpy as np

        self.op, self.dtype, self.cupy = op, dtype, cupy
        source = Path(__file__).with_name("fadd_limit.cu").read_text()
        options = ("-std=c++17", "-ftz=true", f"-DTERM_TYPE={TERM_TYPE[dtype]}", f"-DTHREADS={THREADS}")
        module = cupy.RawModule(code=source, options=options)
        self.kernel = module.get_function(f"limit_{op}")
        self.blocks = BLOCKS_PER_SM * torch.cuda.get_device_properties(0).multi_processor_count
        self.out = torch.empty(self.blocks * THREADS, device="cuda")
        self.arguments = (np.uintp(self.out.data_ptr()), np.int32(PASSES))
        per_pass = cupy.ndarray((1,), np.int32, module.get_global("limit_terms_per_pass")).item()
        self.terms = per_pass * PASSES * self.blocks * THREADS
        for _ in range(WARM_UP):
            self.seconds_per_1e9_terms()

    def seconds_per_1e9_terms(self) -> float:
        """From one launch."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with self.cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            self.kernel((self.blocks,), (THREADS,), self.arguments)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 * 1e9 / self.terms

    def describe(self) -> str:
        """The type and the instructions of one term."""
        packed = {2: "half2, two terms each", 4: "four bytes, a term each"}.get(TERM_TYPE[self.dtype], self.dtype)
        per_term = "subtract, add |.|" if self.op == "forward" else "subtract, saturating fma, fma"
        per_term = "sum of absolute differences" if TERM_TYPE[self.dtype] == 4 else per_term
        return f"{packed}: {per_term}; operands in registers"
