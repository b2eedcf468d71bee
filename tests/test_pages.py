"""Memory of large results is used again, and never while something still looks at it."""

from __future__ import annotations

import copy
import errno
import gc
import mmap
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import child
import numpy as np
import pytest
import torch
from cases import assert_identical

import l1attn_cupy as l1
from l1attn_cupy import testing
from l1attn_cupy.cpu import pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pool is there on Linux only")

LENGTH = 1101  # scores of 4.6 MiB in float32
MIB = 2**20


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    l1.free_all_blocks()


def rows(kind="numpy", seed=0):
    """Query and key at once; scores tell the seed."""
    numbers = testing.inputs((1, LENGTH, 3), (1, 1, 3), "float32", seed=seed)[0]
    return numbers.numpy() if kind == "numpy" else numbers.to(getattr(torch, kind))


def place(array):
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data_ptr()


def scores_of(query):
    return l1.l1_scores(query, query)


@pytest.mark.parametrize("kind", ["numpy", "float32", "float64", "bfloat16"])
def test_pages_are_used_again(kind):
    query = rows(kind) if kind != "bfloat16" else rows(kind).repeat(1, 2, 1)
    result = scores_of(query)
    expected, where = copy.deepcopy(result), place(result)
    del result
    assert pages.kept() > 4 * MIB
    again = scores_of(query)
    assert place(again) == where
    assert pages.kept() == 0
    assert_identical(again, expected)


@pytest.mark.parametrize("kind", ["numpy", "float32"])
def test_pages_of_views_are_not_used_again(kind):
    """What keeps memory alive need not be the result itself."""
    takes = [lambda x: x[0, 3::2], lambda x: np.from_dlpack(x) if kind == "numpy" else torch.from_dlpack(x)]
    takes.append(torch.from_numpy if kind == "numpy" else lambda x: x.numpy())
    for take in takes:
        view = take(scores_of(rows(kind)))
        before = copy.deepcopy(view)
        others = [scores_of(rows(kind, seed)) for seed in (1, 2)]
        assert_identical(view, before)
        assert not any(place(other) <= place(view) < place(other) + other.nbytes for other in others)
        del view, others


def test_pages_of_gradients_and_attention():
    """Their memory comes from the pool as well."""
    x = testing.inputs((9, 1100, 129), (1, 1, 129), "float32")[0].requires_grad_()
    out = l1.l1_attention(x[:, :, :2], x[:, :33, :2], x[:, :33])
    first = place(out)
    del out
    gc.collect()
    assert place(l1.l1_attention(x[:, :, :2], x[:, :33, :2], x[:, :33])) == first
    gc.collect()
    grad = np.ones((9, 1100, 3), np.float32)
    dquery, _ = l1.l1_scores_backward(grad, x.detach().numpy(), x.detach().numpy()[:, :3])
    assert place(dquery) == first


def test_pages_are_bounded(monkeypatch):
    """The pool keeps what was freed last."""
    monkeypatch.setenv("L1ATTN_POOL_MIB", "13")
    results = [scores_of(rows(seed=seed)) for seed in range(4)]
    last = place(results[2])
    del results[3], results[0], results[0], results[0]
    assert 6 * MIB <= pages.kept() <= 13 * MIB
    assert place(scores_of(rows())) == last
    monkeypatch.setenv("L1ATTN_POOL_MIB", "5.9")
    l1.free_all_blocks()
    assert pages.kept() == 0
    scores_of(rows())
    assert pages.kept() == 0  # too large to be kept


def test_pages_without_a_pool(monkeypatch):
    """Results are then what the caller's library makes, and all that it lets one do with them works."""
    monkeypatch.setenv("L1ATTN_POOL_MIB", "0")
    assert scores_of(rows()).flags.owndata
    assert scores_of(rows("float32")).resize_(1, LENGTH + 1, LENGTH).shape == (1, LENGTH + 1, LENGTH)
    assert pages.kept() == 0


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf", ""])
def test_pages_say_what_their_variable_must_be(monkeypatch, value):
    monkeypatch.setenv("L1ATTN_POOL_MIB", value)
    with pytest.raises(ValueError, match=rf"L1ATTN_POOL_MIB must be a number of MiB, at least 0, got '{value}'"):
        scores_of(rows())


def test_pages_in_eight_threads():
    """Each has memory of its own, also while others free theirs."""
    expected = [scores_of(rows(seed=seed)) for seed in range(8)]

    def work(seed):
        for _ in range(5):
            assert_identical(scores_of(rows(seed=seed)), expected[seed])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert pages.kept() <= 256 * MIB


def test_pages_freed_while_the_pool_is_at_work():
    """An object can die within any statement, also one that has the lock: nothing may wait for it."""
    result = scores_of(rows())
    with pages._pool.lock:
        del result
        assert pages.kept() == 0
        result = scores_of(rows())
    del result
    assert pages.kept() > 0


def test_pages_tensors_change_places_and_sizes():
    """As far as torch allows it for memory that it did not allocate: it may not grow in place."""
    query = rows("float32")
    before = scores_of(query).clone()
    shared = scores_of(query).share_memory_()
    assert shared.is_shared()
    assert_identical(shared, before)
    result = scores_of(query)
    assert_identical(pickle.loads(pickle.dumps(result)), before)
    with pytest.raises(RuntimeError, match="not resizable"):
        result.resize_(1, LENGTH + 1, LENGTH)
    assert_identical(result.resize_(3), before.flatten()[:3])
    with torch.inference_mode():
        assert scores_of(query).is_inference()


FORKED = """
import os, sys
import numpy as np
import l1attn_cupy as l1
from l1attn_cupy.cpu import pages

query = np.random.default_rng(0).standard_normal((1101, 3), np.float32)
kept, freed = l1.l1_scores(query, query), l1.l1_scores(query, query)
expected = kept.copy()
del freed
if sys.argv[1] == "locked":
    pages._pool.lock.acquire()  # as another thread may have, at the time of a fork
child = os.fork()
if child == 0:
    right = pages.kept() == 0 and np.array_equal(kept, expected)
    kept[:] = 0
    del kept
    for _ in range(3):
        right &= np.array_equal(l1.l1_scores(query, query), expected)
    right &= pages.kept() > 0
    os._exit(0 if right else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), np.array_equal(kept, expected), pages.kept() > 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the operating system has no fork")
@pytest.mark.parametrize("lock", ["free", "locked"])
def test_pages_of_a_forked_child_are_its_own(lock):
    assert child.run(FORKED, lock).split() == ["0", "True", "True"]


def test_pages_at_exit():
    """Results may outlive every module."""
    code = (
        "import builtins, numpy as np, torch, l1attn_cupy as l1; from l1attn_cupy import plan\n"
        "x, t = np.zeros((1101, 3), np.float32), torch.zeros(1101, 3)\n"
        "builtins.a, builtins.b, plan.c, d = (l1.l1_scores(y, y) for y in (x, t, x, t))"
    )
    done = child.start(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pages_emptied_while_others_borrow():
    """Whoever empties the pool waits for nobody, and nobody is disturbed by it."""
    switch, unraisable = sys.getswitchinterval(), []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(lambda: [pages.borrow(n * MIB).fill(0) for n in (4, 6) * 200]) for _ in range(3)]
            while not all(job.done() for job in jobs):
                l1.free_all_blocks()
            for job in jobs:
                job.result()
    finally:
        sys.setswitchinterval(switch)
        sys.unraisablehook = hook
    assert not unraisable


@pytest.mark.parametrize("refused", ["advice", "memory"])
def test_pages_of_a_system_that_has_none(refused, monkeypatch):
    """Without huge pages, without pages to be taken back, or without memory there is no pool, but a result."""

    class Mapping(mmap.mmap):
        def __new__(cls, *args, **options):
            if refused == "memory":
                raise OSError(errno.ENOMEM, "no memory")
            return super().__new__(cls, *args, **options)

        def madvise(self, *advice):
            raise OSError(errno.EINVAL, "no such advice")

    query = rows()
    expected = scores_of(query)
    l1.free_all_blocks()
    monkeypatch.setattr(pages.mmap, "mmap", Mapping)
    result = scores_of(query)
    assert_identical(result, expected)
    del result
    assert pages.kept() == 0


def test_pages_kept_are_dropped_where_none_may_be(monkeypatch):
    kept, other = scores_of(rows()), scores_of(rows(seed=1))
    del kept
    assert pages.kept() > 0
    monkeypatch.setenv("L1ATTN_POOL_MIB", "0")
    del other
    assert pages.kept() == 0


@pytest.mark.filterwarnings("error")
def test_pages_bad_limit_is_told_of_once(monkeypatch, capsys):
    """By the next large result, and in a report of a bug; not by each result that dies."""
    result = scores_of(rows())
    monkeypatch.setenv("L1ATTN_POOL_MIB", "much")
    del result
    l1.show_config()
    assert "memory kept for large results: L1ATTN_POOL_MIB must be a number of MiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="L1ATTN_POOL_MIB must be a number of MiB, at least 0, got 'much'"):
        scores_of(rows())
