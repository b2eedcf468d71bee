"""A gradient that is not finite takes another way through the CPU kernel; it must not change the bits of other rows."""

import numba
import numpy as np
import pytest

import l1attn_cupy as l1


@pytest.fixture
def threads():
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


def test_scores_backward_infinity_leaves_other_rows_alone(threads):
    """The tile that held an infinity was once summed in another order, and tiles follow the number of threads."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 512, 64), dtype=np.float32)
    grad = rng.standard_normal((512, 512), dtype=np.float32)
    finite, _ = l1.l1_scores_backward(grad, query, key)
    grad[0, 200] = np.inf
    results = []
    for n in (1, numba.config.NUMBA_NUM_THREADS):
        threads(n)
        results.append(l1.l1_scores_backward(grad, query, key)[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0][1:], finite[1:])
    assert not np.isfinite(results[0][0]).all()
