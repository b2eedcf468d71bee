"""On a GPU: every test of the emulated kernels once more, and what no emulator can show.

Streams, graphs, the allocator, more than 2**31 elements, torch.compile, and NVIDIA's own checkers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BROADCAST, DTYPES, SCORES, assert_identical
from child import run
from kernel_cases import KERNELS, Machine, each
from test_kernels_emulated import *  # noqa: F403 - all its tests, with the machine of this file
from torch.library import opcheck

import l1attn_cupy as l1
from l1attn_cupy import testing
from l1attn_cupy.cuda import registry
from l1attn_cupy.cuda.registry import KernelError

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent
A_WHILE = 300_000_000  # clock cycles: over a tenth of a second


@pytest.fixture
def machine():
    return Machine("cuda", "cuda")


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def on_gpu(*shapes, dtype="float32", **more):
    """Query, key and a gradient of their scores."""
    return [array.cuda() for array in testing.inputs(*shapes, dtype, **more)]


def busy() -> bool:
    """Whether the current stream still has work to do."""
    return not torch.cuda.current_stream().query()


# ---- arrays in, arrays out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_cuda_cupy_in_cupy_out(cupy, dtype):
    """The same bits as through torch, and no copy to the host."""
    query, key, grad = on_gpu((2, 97, 65), (2, 129, 65), dtype=dtype)
    q, k, g = (cupy.from_dlpack(array) for array in (query, key, grad))
    for score in SCORES:
        scores = l1.l1_scores(q, k, score=score)
        assert isinstance(scores, cupy.ndarray)
        assert_identical(torch.from_dlpack(scores).cpu(), l1.l1_scores(query, key, score=score).cpu())
        gradients = l1.l1_scores_backward(g, q, k, scores=scores, score=score)
        expected = l1.l1_scores_backward(grad, query, key, score=score)
        for result, wanted in zip(gradients, expected, strict=True):
            assert isinstance(result, cupy.ndarray)
            assert_identical(torch.from_dlpack(result).cpu(), wanted.cpu())


def test_cuda_cupy_layouts(cupy):
    """Views of CuPy arrays: transposed, sliced, backwards, broadcast."""
    rng = cupy.random.RandomState(0)
    query, key = rng.standard_normal((3, 33, 17)), rng.standard_normal((3, 31, 17))
    for change in (
        lambda a: cupy.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda a: a[:, ::2, ::-1],
        lambda a: cupy.broadcast_to(a[:1], a.shape),
    ):
        changed = [change(array) for array in (query, key)]
        expected = l1.l1_scores(*(cupy.ascontiguousarray(array) for array in changed))
        cupy.testing.assert_array_equal(l1.l1_scores(*changed), expected)


@pytest.mark.parametrize("have_ml_dtypes", [True, False])
def test_cuda_bfloat16_of_torch(have_ml_dtypes):
    """With and without the package that gives NumPy, and so DLPack in CuPy, this dtype."""
    if have_ml_dtypes:
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    elif "missing" in run(HIDE_ML_DTYPES + CAN_IMPORT_CUPY):
        pytest.skip("this version of CuPy cannot be imported without ml_dtypes")
    assert run((HIDE_ML_DTYPES if not have_ml_dtypes else "") + BFLOAT16) == "right\n"


HIDE_ML_DTYPES = """
import sys
from importlib.abc import MetaPathFinder

class Nothing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ml_dtypes":
            raise ModuleNotFoundError("No module named 'ml_dtypes'", name=name)

sys.meta_path.insert(0, Nothing())
"""
CAN_IMPORT_CUPY = """
try:
    import cupy
    print("there")
except ImportError as error:
    print("missing", error)
"""
BFLOAT16 = """
import torch, l1attn_cupy as l1
from l1attn_cupy import testing
query, key, grad = (array.cuda() for array in testing.inputs((65, 33), (31, 33), "bfloat16"))
query.requires_grad_()
scores = l1.l1_scores(query, key)
dquery, = torch.autograd.grad(scores, query, grad)
assert scores.dtype == dquery.dtype == torch.bfloat16
expected = testing.Expected(query.cpu(), key.cpu(), grad.cpu())
expected.assert_scores(scores.cpu())
expected.assert_gradients(dquery.cpu(), l1.l1_scores_backward(grad, query.detach(), key)[1].cpu())
print("right")
"""


def test_cuda_bfloat16_of_cupy(cupy):
    """Where CuPy has the dtype (from version 14 on, with ml_dtypes), it is computed with."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    query, key, _ = testing.inputs((33, 17), (31, 17), "bfloat16")
    try:
        q, k = (cupy.asarray(array.float().numpy()).astype(ml_dtypes.bfloat16) for array in (query, key))
    except (TypeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"CuPy {cupy.__version__} has no bfloat16: {error}")
    result = l1.l1_scores(q, k)
    assert result.dtype == ml_dtypes.bfloat16
    testing.Expected(query, key).assert_scores(cupy.asnumpy(result.astype(np.float32)).astype(ml_dtypes.bfloat16))


def test_cuda_integers_of_cupy_are_refused(cupy):
    """bfloat16 numbers viewed as int16 are not taken for integers, nor for bfloat16."""
    with pytest.raises(TypeError, match=r"query must have one of the dtypes float16, .*, got int16"):
        l1.l1_scores(cupy.zeros((3, 4), np.int16), cupy.zeros((3, 4), np.int16))


def test_cuda_takes_no_arrays_on_the_cpu(cupy):
    query = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="backend 'cuda' takes arrays on a CUDA device, got query on cpu"):
        l1.l1_scores(query, query, backend="cuda")
    with pytest.raises(ValueError, match=r"key must be on query's device \(cuda:0\), got cpu"):
        l1.l1_scores(query.cuda(), query)


def test_cuda_device_of_the_arrays():
    """Not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    query, key, grad = (array.to("cuda:1") for array in testing.inputs((65, 33), (31, 33), "float32"))
    assert torch.cuda.current_device() == 0
    scores = l1.l1_scores(query, key)
    assert scores.device == query.device
    expected = testing.Expected(query.cpu(), key.cpu(), grad.cpu())
    expected.assert_scores(scores.cpu())
    expected.assert_gradients(*(gradient.cpu() for gradient in l1.l1_scores_backward(grad, query, key)))


# ---- streams and graphs -------------------------------------------------------------------------------------------


def test_cuda_torch_side_stream():
    """Work is queued on the caller's stream: behind what writes its inputs, ahead of what reads its result."""
    query, key, grad = on_gpu((513, 64), (257, 64))
    scores = l1.l1_scores(query, key)
    expected = [scores, *l1.l1_scores_backward(grad, query, key, scores=scores)]
    late, copy = torch.zeros_like(query), [torch.zeros_like(array) for array in expected]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        late.copy_(query)
        scores = l1.l1_scores(late, key)
        for to, result in zip(copy, [scores, *l1.l1_scores_backward(grad, late, key, scores=scores)], strict=True):
            to.copy_(result)
        assert busy()
    stream.synchronize()
    for result, wanted in zip(copy, expected, strict=True):
        assert_identical(result.cpu(), wanted.cpu())


def test_cuda_cupy_side_stream(cupy):
    """The same for CuPy's current stream, which does not wait for the default one."""
    query, key, _ = on_gpu((513, 64), (257, 64))
    expected = l1.l1_scores(query, key)
    source, late, k = cupy.from_dlpack(query), cupy.zeros((513, 64), np.float32), cupy.from_dlpack(key)
    torch.cuda.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(A_WHILE)
        late[...] = source
        result = l1.l1_scores(late, k)
        assert not stream.done
        stream.synchronize()
    assert_identical(torch.from_dlpack(result).cpu(), expected.cpu())


@pytest.mark.parametrize("variant", ["tiled", "gather"])
def test_cuda_graph(variant):
    """Captured once, replayed with other numbers: forward, backward, and both through autograd."""
    query, key, grad = on_gpu((2, 129, 64), (2, 65, 64))
    leaf = query.clone().requires_grad_()

    def work():
        scores = l1.l1_scores(query, key, variant=variant)
        through = l1.l1_scores(leaf, key, variant=variant)
        gradients = l1.l1_scores_backward(grad, query, key, scores=scores, variant=variant)
        return [scores, *gradients, *torch.autograd.grad(through, leaf, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    for seed in (1, 2):
        for array, new in zip((query, key, grad), on_gpu((2, 129, 64), (2, 65, 64), seed=seed), strict=True):
            array.copy_(new)
        leaf.detach().copy_(query)
        graph.replay()
        for result, expected in zip(results, work(), strict=True):
            assert_identical(result.cpu(), expected.cpu())


def test_cuda_graph_of_atomic_additions():
    """Its sums are set to zero in the graph, too: a second replay does not add to the first."""
    query, key, grad = on_gpu((2, 129, 64), (2, 65, 64))
    l1.l1_scores_backward(grad, query, key, variant="scatter")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = l1.l1_scores_backward(grad, query, key, variant="scatter")
    for _ in range(3):
        graph.replay()
    expected = testing.Expected(query.cpu(), key.cpu(), grad.cpu())
    expected.assert_gradients(*(gradient.cpu() for gradient in gradients))


def test_cuda_does_not_wait_for_the_gpu():
    """Calls return while the GPU is still busy with what came before them: forward, backward, copies and all."""
    query, key, grad = on_gpu((2, 129, 64), (1, 65, 64))
    last_stride_2 = torch.stack([query, query], -1).flatten(-2)[..., ::2]

    def work():
        for variant in ("tiled", "gather", "scatter"):
            if variant != "scatter":
                l1.l1_scores(last_stride_2, key, variant=variant)
            l1.l1_scores_backward(grad, query, key, variant=variant)

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        work()
        assert busy()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- size and memory ----------------------------------------------------------------------------------------------

HUGE = 46400  # 46400**2 is a little more than 2**31


def needs_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} GB are free")


@pytest.mark.parametrize("variant", ["tiled", "gather", "half2"])
def test_cuda_output_beyond_2_31_elements(variant):
    """Offsets are 64-bit: the corners and the middle of a matrix of 4.3 GB."""
    needs_memory(12)
    assert HUGE**2 > 2**31
    query, key, _ = on_gpu((HUGE, 4), (HUGE, 4), dtype="float16")
    scores = l1.l1_scores(query, key, variant=variant, score="negative")
    for i in (0, HUGE // 2, HUGE - 65):
        for j in (0, HUGE // 2 + 1, HUGE - 65):
            expected = testing.Expected(query[i : i + 65].cpu(), key[j : j + 65].cpu(), score="negative")
            part = scores[i : i + 65, j : j + 65].cpu()
            assert expected.scores(part).error < 2**-8, (i, j)  # half2 rounds to 11 bits, and few times here


def assert_gradient(expected: testing.Expected, which: int, gradient: torch.Tensor) -> None:
    """That of query (0) or of key (1) alone is within its bound."""
    pair = [torch.zeros_like(array) for array in (expected.query, expected.key)]
    pair[which] = gradient.cpu()
    agreement = expected.gradients(*pair)[which]
    assert agreement.ok, agreement


@pytest.mark.parametrize("variant", ["tiled", "gather", "scatter"])
def test_cuda_gradient_of_an_output_beyond_2_31_elements(variant):
    needs_memory(16)
    query, key, _ = on_gpu((HUGE, 4), (HUGE, 4), dtype="float16")
    grad = torch.empty(HUGE, HUGE, dtype=torch.float16, device="cuda").normal_()
    dquery, dkey = l1.l1_scores_backward(grad, query, key, variant=variant, score="negative")
    for i in (0, HUGE // 2, HUGE - 3):
        rows = slice(i, i + 3)
        some = testing.Expected(query[rows].cpu(), key.cpu(), grad[rows].cpu(), score="negative")
        assert_gradient(some, 0, dquery[rows])
        some = testing.Expected(query.cpu(), key[rows].cpu(), grad[:, rows].cpu(), score="negative")
        assert_gradient(some, 1, dkey[rows])


@pytest.mark.parametrize("variant", ["tiled", "gather"])
def test_cuda_input_beyond_2_31_elements(variant):
    """In one matrix, and in a batch whose last entry begins beyond 2**31."""
    needs_memory(12)
    query = torch.empty(2**25 + 65, 64, dtype=torch.float16, device="cuda").normal_()
    assert query.numel() > 2**31
    key = query[-3:].clone()
    scores = l1.l1_scores(query.requires_grad_(), key, variant=variant)
    grad = torch.ones_like(scores)
    (dquery,) = torch.autograd.grad(scores, query, grad)
    query.requires_grad_(False)
    for rows in (slice(0, 65), slice(-65, None)):
        expected = testing.Expected(query[rows].cpu(), key.cpu(), grad[rows].cpu())
        expected.assert_scores(scores[rows].detach().cpu())
        assert_gradient(expected, 0, dquery[rows])
    batch = query.as_strided((2, 65, 64), (2**31, 64, 1))
    testing.Expected(batch.cpu(), key.cpu()).assert_scores(l1.l1_scores(batch, key, variant=variant).cpu())


MANY = 70001
END = slice(-3, None)


@pytest.mark.parametrize("variant", ["tiled", "gather"])
def test_cuda_more_than_65535_blocks(variant):
    """In the batch, in the rows and in the columns: the grid is flat."""
    for shapes, part in (
        (((MANY, 3, 4), (MANY, 2, 4)), (END, slice(None), slice(None))),
        (((64 * MANY, 4), (2, 4)), (END, slice(None))),
        (((2, 4), (64 * MANY, 4)), (slice(None), END)),
    ):
        query, key, grad = on_gpu(*shapes)
        rows, columns = (part[0], part[0]) if query.dim() == 3 else part
        expected = testing.Expected(query[rows].cpu(), key[columns].cpu(), grad[part].cpu())
        expected.assert_scores(l1.l1_scores(query, key, variant=variant)[part].cpu())
        dquery, dkey = l1.l1_scores_backward(grad, query, key, variant=variant)
        if columns != END or query.dim() == 3:  # all that is summed up for dquery is there
            assert_gradient(expected, 0, dquery[rows])
        if rows != END or query.dim() == 3:
            assert_gradient(expected, 1, dkey[columns])


def allocated(work):
    """Bytes of GPU memory that a call needs at its peak beyond what was there, and its results."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["tiled", "gather"])
def test_cuda_memory_is_the_outputs_alone(variant, dtype):
    """No temporary, in either direction."""
    query, key, grad = on_gpu((4, 257, 64), (4, 513, 64), dtype=dtype)
    size = query.element_size()
    peak, scores = allocated(lambda: l1.l1_scores(query, key, variant=variant))
    assert peak - scores.numel() * size <= 512  # the allocator's step
    peak, pair = allocated(lambda: l1.l1_scores_backward(grad, query, key, scores=scores, variant=variant))
    assert peak - sum(gradient.numel() for gradient in pair) * size <= 2 * 512


def test_cuda_memory_of_autograd():
    """Between forward and backward only the scores are kept."""
    query, key, grad = on_gpu((4, 257, 64), (4, 513, 64))
    leaves = [array.requires_grad_() for array in (query, key)]
    peak, _ = allocated(lambda: torch.autograd.grad(l1.l1_scores(*leaves), leaves, grad))
    assert peak - 4 * (grad.numel() + query.numel() + key.numel()) <= 3 * 512


# ---- the same bits ------------------------------------------------------------------------------------------------


@each("scores_forward")
def test_cuda_scores_same_bits_250_times(machine, kernel):
    """Many blocks at once, run after run: what a race would not give."""
    query, key, _ = on_gpu((8, kernel.length_q, 128), (8, 1025, 128), dtype=kernel.dtype)
    call = {"backend": machine.backend, "variant": kernel.variant.name}
    first = l1.l1_scores(query, key, **call)
    assert all(torch.equal(l1.l1_scores(query, key, **call), first) for _ in range(250))


@each("scores_backward", deterministic=True)
def test_cuda_gradients_same_bits_250_times(machine, kernel):
    query, key, grad = on_gpu((8, kernel.length_q, 128), (8, 1025, 128), dtype=kernel.dtype)
    call = {"scores": l1.l1_scores(query, key), "backend": machine.backend, "variant": kernel.variant.name}
    first = l1.l1_scores_backward(grad, query, key, **call)
    for _ in range(250):
        again = l1.l1_scores_backward(grad, query, key, **call)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


# ---- torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_autograd_agrees_with_the_cpu(dtype, score):
    """Both are within their bounds, and so are the gradients of arrays that were broadcast."""
    for shapes in (((2, 65, 33), (2, 129, 33)), *BROADCAST[1:4]):
        query, key, grad = testing.inputs(*shapes, dtype)
        call = {"score": score, "scale": 0.3, "eps": 0.02}
        expected = testing.Expected(query, key, grad, **call)
        for device in ("cpu", "cuda"):
            leaves = [array.to(device, copy=True).requires_grad_() for array in (query, key)]
            scores = l1.l1_scores(*leaves, **call)
            gradients = torch.autograd.grad(scores, leaves, grad.to(device))
            expected.assert_scores(scores.cpu())
            expected.assert_gradients(*(gradient.cpu() for gradient in gradients))


def test_cuda_torch_compile():
    """One graph, forward and backward; the same bits as eager."""
    query, key, grad = on_gpu((2, 65, 33), (129, 33))

    def loss(query, key):
        return (l1.l1_scores(query * 2, key, score="laplacian", scale=0.1) * grad).sum()

    expected = torch.autograd.grad(loss(*(leaves := [a.clone().requires_grad_() for a in (query, key)])), leaves)
    compiled = torch.compile(loss, fullgraph=True)
    gradients = torch.autograd.grad(compiled(*(leaves := [a.clone().requires_grad_() for a in (query, key)])), leaves)
    for result, wanted in zip(gradients, expected, strict=True):
        assert_identical(result.cpu(), wanted.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_opcheck(dtype):
    query, key, grad = on_gpu((2, 33, 17), (31, 17), dtype=dtype)
    options = ("inverse", 0.5, 1e-2, None, None)
    opcheck(torch.ops.l1attn.scores.default, (query, key, *options))
    scores = l1.l1_scores(query, key, scale=0.5, eps=1e-2)
    opcheck(torch.ops.l1attn.scores_backward.default, (grad, query, key, scores, True, True, *options))


@pytest.mark.parametrize("score", SCORES)
def test_cuda_gradcheck(score):
    query, key, _ = on_gpu((2, 3, 4), (1, 5, 4), dtype="float64")
    leaves = [array.requires_grad_() for array in (query, key)]
    assert torch.autograd.gradcheck(lambda q, k: l1.l1_scores(q, k, score=score, scale=0.5), leaves, eps=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_cuda_gradgradcheck(score):
    """Second derivatives in both modes, of the scores and of attention."""
    query, key, _ = on_gpu((2, 2, 3), (1, 3, 3), dtype="float64")
    leaves = [array.requires_grad_() for array in (query, key)]
    modes = {"check_fwd_over_rev": True, "fast_mode": True}
    for function in (l1.l1_scores, lambda q, k, **call: l1.l1_attention(q, k, k, **call)):
        call = {"score": score, "scale": 0.5, "eps": 0.1}
        assert torch.autograd.gradgradcheck(lambda q, k: function(q, k, **call), leaves, **modes)  # noqa: B023


# ---- errors -------------------------------------------------------------------------------------------------------


def test_cuda_compile_error_says_where_and_how(tmp_path, monkeypatch):
    """File and line as written, the log, the architecture and the options."""
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path))
    text = (registry.packaged_folder() / "scores_forward_gather.cu").read_text()
    (tmp_path / "scores_forward_mine.cu").write_text(text.replace("acc_t sum = 0;", "acc_t sum = zero;"))
    line = text.partition("acc_t sum = 0;")[0].count("\n") + 1
    query, key, _ = on_gpu((5, 7), (9, 7))
    with pytest.raises(KernelError) as caught:
        l1.l1_scores(query, key, variant="mine")
    message = str(caught.value)
    assert re.search(rf'{tmp_path}/scores_forward_mine\.cu\({line}\): error: identifier "zero"', message)
    assert re.search(r"sm_\d+", message)
    assert "-DBLOCK_K=32" in message
    assert "-ftz=true" in message
    (tmp_path / "scores_forward_mine.cu").write_text(text)  # mended: used by the next call
    assert_identical(l1.l1_scores(query, key, variant="mine"), l1.l1_scores(query, key, variant="gather"))


# ---- NVIDIA's checkers --------------------------------------------------------------------------------------------


def compute_sanitizer() -> str | None:
    """The tool of the CUDA toolkit, on PATH or where toolkits are."""
    folders = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    places = [f"{folder}/bin" for folder in folders if folder]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_cuda_compute_sanitizer(cupy, tool):
    """No access out of bounds, no race in shared memory, no read of memory that nobody wrote, no divergent barrier."""
    program = compute_sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(ROOT / "tests" / "sanitized.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, output[-4000:]
    assert f"{2 * len({(k.variant.path, k.variant.line) for k in KERNELS})} calls" in output
