"""Threads, forks and Numba's threading layers. Each case that could end the process has a process of its own."""

from __future__ import annotations

import importlib
import textwrap

import numba
import numpy as np
import pytest
import torch
from cases import assert_identical
from child import run

import l1attn_cupy as l1
from l1attn_cupy import testing
from l1attn_cupy.cpu import threads

LAYERS = ["default", "omp", "workqueue"]

PREPARE = """
import os, sys, threading
import numpy as np
import l1attn_cupy as l1
from l1attn_cupy.cpu import threads

rng = np.random.default_rng(0)
query, key = rng.standard_normal((2, 4, 129, 64)).astype(np.float32)  # enough work for more than one thread
grad = np.ones((4, 129, 129), np.float32)


def call():
    out, lse = l1.l1_attention(query, key, key, return_lse=True)
    attention = [out, lse, *l1.l1_attention_backward(out, query, key, key, out, lse)]
    return [l1.l1_scores(query, key), *l1.l1_scores_backward(grad, query, key), *attention]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


assert threads.count(query, query.size * 129) > 1
one = np.ones((1, 1), np.float32)
l1.l1_scores_backward(one, one, l1.l1_scores(one, one))  # compiles the serial kernels, for children that need them
l1.l1_attention_backward(one, one, one, one, one, one[0])
l1.l1_attention(one, one, one)
"""

EIGHT_THREADS = """
barrier, results = threading.Barrier(8), {}


def work(name):
    barrier.wait()
    results[name] = [call() for _ in range(5)]


workers = [threading.Thread(target=work, args=(name,)) for name in range(8)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
expected = call()
print(sum(same(result, expected) for name in results for result in results[name]))
"""

FORK = """
import signal
expected = call()  # starts the threads that the child will not have
child = os.fork()
if child == 0:
    signal.alarm(60)  # a call that hangs is a failure too
    try:
        os._exit(0 if same(call(), expected) else 3)
    finally:
        os._exit(4)
_, status = os.waitpid(child, 0)
assert same(call(), expected)
print(os.waitstatus_to_exitcode(status))
"""

FORK_DURING_CALLS = """
import signal
expected, done = call(), False


def keep_calling():
    while not done:
        call()


worker = threading.Thread(target=keep_calling)
worker.start()
statuses = set()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            os._exit(0 if same(call(), expected) else 3)
        finally:
            os._exit(4)
    statuses.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done = True
worker.join()
print(statuses)
"""

DATA_LOADER = """
import torch


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        scores = l1.l1_scores(torch.from_numpy(query[index]), torch.from_numpy(key[index]))
        whole = l1.l1_scores(query, key)  # NumPy arrays, on as many threads as Numba has
        return scores, torch.from_numpy(whole[index])


expected = torch.from_numpy(l1.l1_scores(query, key))
loader = torch.utils.data.DataLoader(Pairs(), num_workers=2, multiprocessing_context="fork", timeout=60)
print(sum(torch.equal(one[0], right) and torch.equal(two[0], right) for (one, two), right in zip(loader, expected)))
"""

FIRST_CALL_IN_CHILD = """
child = os.fork()
if child == 0:
    try:
        os._exit(0 if same(call(), call()) else 3)
    finally:
        os._exit(4)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


def with_layer(layer: str, code: str) -> str:
    """The last line that ``code`` prints with two threads or more under a threading layer."""
    if layer == "omp":
        try:
            importlib.import_module("numba.np.ufunc.omppool")
        except ImportError as error:
            pytest.skip(f"this Numba has no OpenMP layer: {error}")
    environment = {} if layer == "default" else {"NUMBA_THREADING_LAYER": layer}
    return run(PREPARE + code, NUMBA_NUM_THREADS="4", **environment).splitlines()[-1]


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_eight_threads_at_once(layer):
    """Concurrent calls end the process under a bare ``workqueue`` layer."""
    assert with_layer(layer, EIGHT_THREADS) == "40"


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_after_fork(layer):
    """A parallel call in the child of a process that made one ends the child under GNU OpenMP."""
    assert with_layer(layer, FORK) == "0"


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_first_call_after_fork(layer):
    assert with_layer(layer, FIRST_CALL_IN_CHILD) == "0"


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_fork_during_calls(layer):
    """A lock that another thread holds at the moment of the fork is never released in the child."""
    assert with_layer(layer, FORK_DURING_CALLS) == "{0}"


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_in_data_loader_worker(layer):
    assert with_layer(layer, DATA_LOADER) == "4"


def test_scores_layer_is_chosen():
    """tbb where the package is installed, since it survives both; a layer that the user named otherwise."""
    code = "from l1attn_cupy.cpu import threads; print(threads.layer())"
    if importlib.util.find_spec("tbb") or importlib.util.find_spec("numba.np.ufunc.tbbpool"):
        assert with_layer("default", code).startswith("tbb")
    assert with_layer("workqueue", code).startswith("workqueue")


def test_scores_same_bits_with_any_number_of_threads():
    """Threads divide the results among them, never a sum."""
    code = """
    import hashlib, numba, torch
    digests = set()
    for n in (1, 2, 3, 4):
        numba.set_num_threads(n)
        torch.set_num_threads(n)
        for arrays in ((grad, query, key), [torch.from_numpy(array) for array in (grad, query, key)]):
            results = [l1.l1_scores(*arrays[1:]), *l1.l1_scores_backward(*arrays)]
            digests.add(hashlib.sha256(b"".join(np.asarray(result).tobytes() for result in results)).hexdigest())
    print(len(digests))
    """
    assert with_layer("default", textwrap.dedent(code)) == "1"


@pytest.fixture
def launches(monkeypatch):
    """The number of threads of each launch of a kernel."""
    seen = []
    launch = threads.launch

    def spy(kernel, workers, *arguments):
        seen.append(workers)
        launch(kernel, workers, *arguments)

    monkeypatch.setattr(threads, "launch", spy)
    return seen


@pytest.mark.parametrize("wanted", [1, 2])
def test_scores_torch_threads_are_respected(wanted, launches):
    """`torch.set_num_threads` holds for tensors, whatever Numba's own setting is."""
    if wanted > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    query, key, grad = testing.inputs((129, 64), (129, 64), "float32")
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        l1.l1_scores(query, key)
        l1.l1_scores_backward(grad, query, key)
    finally:
        torch.set_num_threads(before)
    assert set(launches) == {wanted}


@pytest.mark.parametrize("wanted", [1, 2])
def test_scores_numba_threads_are_respected(wanted, launches):
    """Numba's setting holds for NumPy arrays, and is left as it was."""
    if wanted > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    query, key, _ = (array.numpy() for array in testing.inputs((129, 64), (129, 64), "float32"))
    before = numba.get_num_threads()
    numba.set_num_threads(wanted)
    try:
        l1.l1_scores(query, key)
        assert numba.get_num_threads() == wanted
    finally:
        numba.set_num_threads(before)
    assert launches == [wanted]


def test_scores_more_torch_threads_than_numba_has():
    """Numba refuses more threads than it was started with: the call takes what there is."""
    query, key, _ = testing.inputs((129, 64), (129, 64), "float32")
    expected = l1.l1_scores(query, key)
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        assert_identical(l1.l1_scores(query, key), expected)
    finally:
        torch.set_num_threads(before)


def test_scores_small_calls_stay_on_one_thread(launches):
    """Waking other threads costs more than a small call."""
    x = np.ones((16, 16), np.float32)
    l1.l1_scores(x, x)
    assert launches == [1]
