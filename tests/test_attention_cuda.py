"""On a GPU: every test of the emulated kernels of attention once more, and that memory is linear."""

from __future__ import annotations

import pytest
import torch
from test_attention_emulated import *  # noqa: F403 - all its tests, with the machine of this file
from test_attention_emulated import Machine

import l1attn_cupy as l1

pytestmark = pytest.mark.gpu


@pytest.fixture
def machine() -> Machine:
    return Machine("cuda", "cuda")


def test_attention_cuda_memory_is_linear():
    """At length 8192 the scores of one head are 256 MiB; no tensor of theirs is made."""
    query, key, value = (torch.randn(8192, 16, device="cuda", requires_grad=True) for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    l1.l1_attention(query, key, value).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 << 20
