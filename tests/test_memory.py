"""Peak memory at length 4096, where a temporary of the size of the scores is 64 MiB, one of L * S * E is 4 GiB."""

from __future__ import annotations

import sys

import pytest
from child import run

MOST_MIB = 24  # scratch memory of the threads, and pages that the allocator keeps

MEASURE = """
import gc, sys
import numpy as np
import l1attn_cupy as l1


def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def beyond_results(call):
    gc.collect()
    l1.free_all_blocks()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = memory("VmRSS")
    results = call()
    return memory("VmHWM") - before - sum(result.nbytes for result in results) / 2**20


rng = np.random.default_rng(0)
small = rng.standard_normal((257, 64)).astype(np.float32)
query, key = rng.standard_normal((2, 4096, 64)).astype(np.float32)
step = {step}
step(small, small, np.ones((257, 257), np.float32), l1.l1_scores(small, small))  # compiles, starts threads
grad, scores = np.ones((4096, 4096), np.float32), np.ones((4096, 4096), np.float32)
print(beyond_results(lambda: step(query, key, grad, scores)))
"""

STEPS = {
    "forward": "lambda q, k, g, s: (l1.l1_scores(q, k),)",
    "backward from saved scores": "lambda q, k, g, s: l1.l1_scores_backward(g, q, k, scores=s)",
    "backward anew": "lambda q, k, g, s: l1.l1_scores_backward(g, q, k)",
    "attention": "lambda q, k, g, s: l1.l1_attention(q, k, k, return_lse=True)",
    "attention backward": (
        "lambda q, k, g, s: l1.l1_attention_backward(q, q, k, k, *l1.l1_attention(q, k, k, return_lse=True))"
    ),
    "attention with a mask and its gradient": (
        "lambda q, k, g, s: l1.l1_attention_backward("
        "q, q, k, k, *l1.l1_attention(q, k, k, g, return_lse=True), g, return_dmask=True)"
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("step", STEPS)
def test_memory_beyond_results(step):
    """No temporary of size L * S in a backward pass or in attention, none of size L * S * E anywhere."""
    extra = float(run(MEASURE.replace("{step}", STEPS[step])))
    assert extra <= MOST_MIB, f"{extra:.1f} MiB beyond the results"


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_is_measured():
    """The measurement sees a temporary that is freed before the call returns."""
    wasteful = "lambda q, k, g, s: ((np.ones_like(g) * 2).sum(0),)"
    assert float(run(MEASURE.replace("{step}", wasteful))) > MOST_MIB
