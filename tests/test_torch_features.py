"""PyTorch's features around `l1_scores`, `l1_attention` and the module; the table in the README names these tests."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest
import torch
from cases import assert_identical
from child import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import l1attn_cupy as l1
import l1attn_cupy.autograd_attention  # registers the operators
from l1attn_cupy import reference, testing
from l1attn_cupy.testing import one_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself

CALLS = {
    "scores": lambda q, k, v: l1.l1_scores(q, k, score="laplacian", scale=0.3),
    "attention": lambda q, k, v: l1.l1_attention(q, k, v, is_causal=True, scale=0.3, score="negative"),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def inputs(dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 33, 17), (2, 31, 17), (2, 31, 5)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def gradients(result, given):
    return torch.autograd.grad(result.pow(2).sum(), given, allow_unused=True)


@calls
def test_feature_autocast(call):
    """As with arrays of autocast's dtype: that of the result; gradients have the leaves' own."""
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = call(*given)
    halves = [x.detach().bfloat16().requires_grad_() for x in given]
    expected = call(*halves)
    assert_identical(result.detach(), expected.detach())
    for found, wanted in zip(gradients(result, given), gradients(expected, halves), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_identical(found, wanted.float())


def test_feature_autocast_accumulates_in_float32():
    """300 channels: a sum in bfloat16 would be wrong in its first digits."""
    query, key, _ = testing.inputs((33, 300), (31, 300), "float32")
    with torch.autocast("cpu", torch.bfloat16):
        scores = l1.l1_scores(query, key, score="distance")
    testing.Expected(query.bfloat16(), key.bfloat16(), score="distance").assert_scores(scores)


@calls
def test_feature_autocast_of_mixed_dtypes(call):
    """What earlier operations left in different dtypes; float64 is left alone, as by torch's own attention."""
    query, key, value = inputs(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(query, key.bfloat16(), value).dtype is torch.bfloat16
        assert call(query.double(), key.double(), value.double()).dtype is torch.float64
        with torch.autocast("cpu", enabled=False):
            assert call(query, key, value).dtype is torch.float32


def test_feature_autocast_mask_and_lse():
    """An additive mask is cast with the others; lse stays in the dtype of accumulation."""
    query, key, value = inputs(requires_grad=False)
    mask = torch.randn(33, 31, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = l1.l1_attention(query, key, value, mask, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    (out.float().sum() + lse.sum()).backward()
    assert mask.grad.dtype is torch.float32


@pytest.mark.parametrize("need_weights", [False, True])
def test_feature_autocast_module(need_weights):
    """Attention inside the module takes what the projections made: bfloat16, whose weights are made in float32."""
    module, x = l1.L1MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, x, x, need_weights=need_weights, average_attn_weights=False)
        q, k, _ = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    out.sum().backward()
    assert out.dtype is torch.bfloat16
    assert all(parameter.grad.dtype is torch.float32 for parameter in module.parameters())
    if need_weights:
        q, k = (x.detach().unflatten(-1, (3, 4)).transpose(1, 2).float() for x in (q, k))
        exact = reference.l1_scores(q, k, scale=0.5).softmax(-1)
        assert weights.dtype is torch.bfloat16
        torch.testing.assert_close(weights.double(), exact.bfloat16().double(), rtol=2**-7, atol=0)


@calls
def test_feature_autocast_compiled(call):
    """The casts are in the graph."""
    given = inputs(requires_grad=False)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(torch.compile(call, fullgraph=True, backend="aot_eager")(*given), call(*given))


@calls
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_feature_checkpoint(use_reentrant, call):
    """Computed anew in the backward pass: the same gradients."""
    found = []
    for given in (inputs(), inputs()):
        result = call(*given) if found else checkpoint(call, *given, use_reentrant=use_reentrant)
        result.pow(2).sum().backward()
        found.append([x.grad for x in given])
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert_identical(ours, expected)


class Network(torch.nn.Module):
    """Both operators, with parameters before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = l1.L1MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        out, _ = self.attention(x, x, x, need_weights=False)
        fused, lse = l1.l1_attention(out, x, x, is_causal=True, return_lse=True)
        return l1.l1_scores(fused, x * 2).logsumexp(-1) + lse


def exported(path=None):
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(Network(), (torch.randn(2, 5, 12),), dynamic_shapes=({1: length},))
    if path:
        torch.export.save(program, path)
        program = torch.export.load(path)
    return program


def test_feature_export(tmp_path):
    """Our operators are nodes of the graph, for any length, also after it was written to a file."""
    program = exported(tmp_path / "network.pt2")
    names = {str(node.target) for node in program.graph.nodes}
    assert {"l1attn.attention.default", "l1attn.scores.default"} <= names
    for length in (5, 9):
        x = torch.randn(2, length, 12)
        torch.testing.assert_close(program.module()(x), Network()(x))


def test_feature_exported_graph_trains():
    """What is upstream of an operator that is called by its name gets its gradient."""
    x, found = torch.randn(2, 7, 12), []
    for module in (exported().module(), Network()):
        module(x).pow(2).sum().backward()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])
        assert gradient.any()


def test_feature_operators_by_name():
    """In graphs, ``torch.ops.l1attn`` is called directly: gradients and tangents flow, or it is an error."""
    query, key, value = inputs(torch.float64)
    options = ("inverse", 1.0, 0.1, None, None)
    scores = torch.ops.l1attn.scores(query, key, *options)
    found = torch.autograd.grad(scores.sum(), (query, key), create_graph=True)
    expected = torch.autograd.grad(l1.l1_scores(query, key, eps=0.1).sum(), (query, key))
    grad = torch.ones_like(scores).requires_grad_()
    by_name = torch.ops.l1attn.scores_backward(grad, query, key, None, True, True, *options)
    for a, b, c in zip(found, by_name, expected, strict=True):
        assert_identical(a.detach(), c)
        assert_identical(b.detach(), c)
        assert a.requires_grad
        assert b.requires_grad
    no_mask = (query, key, value, None, None, None, False, False, -1, -1, *options)
    functions = (
        lambda q: torch.ops.l1attn.scores(q, key.detach(), *options),
        lambda q: l1.l1_scores(q, key.detach(), eps=0.1),
    )
    query, value = query.detach(), value.detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query)
        tangents = [torch.autograd.forward_ad.unpack_dual(function(dual)).tangent for function in functions]
        assert_identical(*tangents)
        with pytest.raises(RuntimeError, match="forward mode AD"):
            torch.ops.l1attn.attention(dual, *no_mask[1:])
    for transform in (torch.func.grad, lambda f: torch.func.jvp(f, (query,), (query,))):
        with pytest.raises(NotImplementedError, match=r"scores must not be differentiated by torch.func"):
            transform(lambda q: functions[0](q).sum())(query)


class Watcher(TorchDispatchMode):
    """Notes the names of our operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "l1attn":
            self.seen.append(operator._opname)
        return operator(*args, **(kwargs or {}))


@calls
@pytest.mark.parametrize("watch", ["mode", "profiler"])
def test_operators_are_seen(call, watch):
    """Nobody who looks misses our operators, which are left out where nobody does."""
    given = inputs()
    with Watcher() if watch == "mode" else torch.profiler.profile() as watcher:
        gradients(call(*given), given)
    seen = watcher.seen if watch == "mode" else {event.key for event in watcher.key_averages()}
    name = next(name for name in CALLS if CALLS[name] is call)
    assert {n.removeprefix("l1attn::") for n in seen} >= {name, f"{name}_backward"}


@calls
def test_operators_of_tensors_without_data(call):
    """Torch makes zeros that have no memory, in forward mode; their type is that of any tensor."""
    query, key, value = inputs(requires_grad=False)
    zeros = torch._efficientzerotensor(query.shape)
    assert_identical(call(zeros, key, value), call(torch.zeros_like(query), key, value))


@calls
def test_operators_of_a_batch_of_gradients(call):
    """``is_grads_batched`` maps over the backward pass with tensors whose type, too, is that of any tensor."""
    given = inputs(torch.float64)
    result = call(*given)
    grads = torch.randn(3, *result.shape, dtype=result.dtype)
    found = torch.autograd.grad(result, given, grads, is_grads_batched=True, allow_unused=True, retain_graph=True)
    for n, grad in enumerate(grads):
        expected = torch.autograd.grad(result, given, grad, allow_unused=True, retain_graph=True)
        for ours, one in zip(found, expected, strict=True):
            if one is not None:
                assert_identical(ours[n], one)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both of two processes, connected by Gloo, print; see two_processes.py."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch was built without torch.distributed or without Gloo")
    file = tmp_path_factory.mktemp("gloo") / "store"
    script = ROOT / "tests" / "two_processes.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    commands = [[sys.executable, "-W", "ignore", str(script), str(rank), str(file)] for rank in range(2)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    return [text.split("\n") for text in printed]


def test_feature_ddp(two_processes):
    assert all("DDP" in lines for lines in two_processes)


def test_feature_fsdp2(two_processes):
    if any("no FSDP2" in lines for lines in two_processes):
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    assert all("FSDP2" in lines for lines in two_processes)


@pytest.mark.gpu
@calls
def test_feature_cuda_graphs(call):
    """Forward and backward in one graph: replayed with other numbers, the gradients are those of these."""
    given = [x.detach().cuda().requires_grad_() for x in inputs()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first call compiles, which a capture must not contain
        for _ in range(2):
            gradients(call(*given), given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*given)
        found = gradients(result, given)
    with torch.no_grad():
        for x in given:
            x.copy_(x.flip(-1) * 0.5 + 0.25)
    graph.replay()
    expected = call(*given)
    assert_identical(result.detach().cpu(), expected.detach().cpu())
    for ours, wanted in zip(found, gradients(expected, given), strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            assert_identical(ours.cpu(), wanted.cpu())


@pytest.mark.gpu
@calls
def test_feature_autocast_cuda(call):
    given = [x.cuda() for x in inputs(requires_grad=False)]
    with torch.autocast("cuda", torch.float16):
        result = call(*given)
    assert_identical(result.cpu(), call(*(x.half() for x in given)).cpu())


def test_feature_deterministic_algorithms():
    """Gradients are the same bits on one thread and on several, with nothing to switch on."""
    given = inputs()
    many = gradients(CALLS["attention"](*given), given)
    with one_thread():
        for ours, expected in zip(gradients(CALLS["attention"](*given), given), many, strict=True):
            assert_identical(ours, expected)


def test_table_names_the_tests():
    """Each test that the README's table of features names exists, and each test of this file is named in it."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| feature | works |") :].split("\n\n")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    existing, here = set(), set()
    for path in (ROOT / "tests").glob("test_*.py"):
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        existing |= {name for name in names if name.startswith("test_")}
        here |= {name for name in names if name.startswith("test_feature_")}
    assert named <= existing, f"no such tests: {sorted(named - existing)}"
    assert here <= named, f"not in the table: {sorted(here - named)}"
    for row in table.splitlines()[2:]:
        assert re.search(r"`test_\w+`", row), f"no test: {row}"
