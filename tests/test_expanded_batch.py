"""Batch dimensions that an expanded array merges, and its contiguous gradient does not."""

import pytest
import torch

import l1attn_cupy as l1
from l1attn_cupy import reference

EXPANDED_QUERY = (torch.randn(1, 1, 3, 4).expand(2, 1, 3, 4), torch.randn(2, 3, 5, 4))
EXPANDED_KEY = (torch.randn(2, 3, 3, 4), torch.randn(1, 1, 5, 4).expand(2, 1, 5, 4))


@pytest.mark.parametrize("variant", [None, "gather", "tiled", "scatter"])
@pytest.mark.parametrize("query, key", [EXPANDED_QUERY, EXPANDED_KEY], ids=["query", "key"])
def test_scores_backward_expanded_batch(query, key, variant):
    """The scatter variant once used the merged dimensions of one gradient with the strides of the other."""
    grad = torch.randn(2, 3, 3, 5)
    backend = "cpu" if variant is None else "emulator"
    found = l1.l1_scores_backward(grad, query, key, score="distance", backend=backend, variant=variant)
    for gradient, right in zip(found, reference.l1_scores_backward(grad, query, key, score="distance"), strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)
