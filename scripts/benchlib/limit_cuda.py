"""The GPU's own limit: fadd_limit.cu, compiled by CuPy, timed by CUDA events on torch's stream."""

from __future__ import annotations

from pathlib import Path

import torch

from benchlib.timing import Elapsed

THREADS, BLOCKS_PER_SM, PASSES, WARM_UP = 256, 8, 20, 3  # a millisecond or two a launch
TERM_TYPE = {"float32": 1, "bfloat16": 1, "float16": 2, "float64": 3}  # bfloat16 is summed in float32
HAS_LIMIT = {"forward": set(TERM_TYPE), "backward": set(TERM_TYPE) - {"float64"}}


class CudaLimit:
    """Terms per second of one op and dtype with operands in registers; a half2 counts as two terms."""

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
            self.sample()

    def sample(self) -> Elapsed:
        """Seconds of 1e9 terms, from one launch."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with self.cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            self.kernel((self.blocks,), (THREADS,), self.arguments)
        end.record()
        end.synchronize()
        return Elapsed(float(start.elapsed_time(end)) * 1e-3 * 1e9 / self.terms)

    def describe(self) -> str:
        """The type and the instructions of one term."""
        packed = "half2, two terms each" if self.dtype == "float16" else self.dtype
        per_term = "subtract, add |.|" if self.op == "forward" else "subtract, saturating fma, fma"
        return f"{packed}: {per_term}; operands in registers"
