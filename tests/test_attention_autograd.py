"""`l1_attention` in torch's autograd and in `torch.compile`."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from cases import SCORES, assert_identical, to_numpy
from torch.library import opcheck

import l1attn_cupy as l1
from l1attn_cupy import reference, testing_attention
from l1attn_cupy.cpu import attention_backend

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself


def leaves(*shapes, dtype="float64", mask=None, **more):
    """Query, key, value and mask that require gradients, and a gradient of the result."""
    given = testing_attention.inputs(*shapes, 3, dtype, mask=mask, **more)
    inputs = [x if x is None else x.requires_grad_(x.is_floating_point()) for x in given[:4]]
    return inputs, given.grad_out, given.grad_lse


@pytest.mark.parametrize("place", [{}, {"is_causal": True}, {"window": (1, 2)}], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_attention_gradcheck(score, place):
    """All inputs and both results, against finite differences; every query has a key."""
    inputs, _, _ = leaves((2, 3, 4), (2, 5, 4), mask=("added", (3, 5)))
    gap = (inputs[0].detach().unsqueeze(-2) - inputs[1].detach().unsqueeze(-3)).abs().min()
    assert gap > 1e-5
    call = {"score": score, "scale": 0.5, "return_lse": True, **place}
    assert torch.autograd.gradcheck(lambda *x: l1.l1_attention(*x, **call), inputs, eps=1e-6)


def test_attention_gradcheck_shared_heads():
    inputs, _, _ = leaves((2, 4, 3, 4), (2, 2, 5, 4), mask=("added", (4, 1, 5)), enable_gqa=True)
    call = {"enable_gqa": True, "scale": 0.5, "return_lse": True}
    assert torch.autograd.gradcheck(lambda *x: l1.l1_attention(*x, **call), inputs, eps=1e-6)


def test_attention_gradcheck_varlen():
    shapes = ((5, 2, 4), (7, 2, 4), (7, 2, 3))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(*x):
        return l1.l1_attention_varlen(*x, [0, 2, 5], [0, 4, 7], scale=0.5, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs, eps=1e-6)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("saved", ["as returned", "unrounded"])
def test_attention_backward_function(saved, dtype, library):
    """As accurate as ``backward()``, but for what the rounding of out and of lse makes of the gradients."""
    given = testing_attention.inputs((2, 33, 17), (2, 31, 17), 3, dtype, mask=("added", (31,)))
    call = {"score": "negative", "scale": 0.3}
    out, lse = l1.l1_attention(*given[:4], return_lse=True, **call)
    rounding = torch.finfo(out.dtype).eps + lse.abs().max().item() * torch.finfo(lse.dtype).eps
    if saved == "unrounded":
        out, lse = reference.l1_attention(*given[:4], **call)
        out, rounding = out.float(), 0
    arguments = [given.grad_out, *given[:3], out, lse, given.mask, given.grad_lse]
    *arguments, grad_lse = map(to_numpy, arguments) if library == "numpy" else arguments
    gradients = l1.l1_attention_backward(*arguments, grad_lse=grad_lse, return_dmask=True, **call)
    for agreement in testing_attention.ExpectedAttention(*given, **call).gradients(*gradients):
        assert agreement.error <= agreement.bound + rounding


@pytest.mark.parametrize("used", ["out", "lse"])
def test_attention_autograd_one_result_used(used):
    """The gradient of the other is not there, and counts as zero."""
    inputs, _, _ = leaves((2, 33, 17), (2, 31, 17))
    results = dict(zip(("out", "lse"), l1.l1_attention(*inputs[:3], return_lse=True), strict=True))
    grads = [torch.ones_like(x) if name == used else torch.zeros_like(x) for name, x in results.items()]
    expected = torch.autograd.grad([*results.values()], inputs[:3], grads, retain_graph=True)
    gradients = torch.autograd.grad(results[used].sum(), inputs[:3])
    for a, b in zip(gradients, expected, strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("needed", ["query", "key", "value", "mask"])
def test_attention_autograd_only_needed_gradients(needed, monkeypatch):
    """A frozen value costs nothing."""
    asked = []
    real = attention_backend.attention_backward

    def spy(plan, saved, given, wanted):
        asked.append(set(wanted))
        real(plan, saved, given, wanted)

    monkeypatch.setattr(attention_backend, "attention_backward", spy)
    inputs, grad, _ = leaves((33, 17), (31, 17), mask=("added", (33, 1)))
    names = ("query", "key", "value", "mask")
    for name, leaf in zip(names, inputs, strict=True):
        leaf.requires_grad_(name == needed)
    l1.l1_attention(*inputs).backward(grad)
    assert asked == [{f"d{needed}"}]
    assert [leaf.grad is not None for leaf in inputs] == [name == needed for name in names]


def test_attention_autograd_no_grad():
    inputs, _, _ = leaves((33, 17), (31, 17))
    with torch.no_grad():
        assert not l1.l1_attention(*inputs[:3]).requires_grad
    assert not l1.l1_attention(*(x.detach() for x in inputs[:3])).requires_grad


def test_attention_self_attention_gradient():
    """Three gradients arrive at one tensor."""
    x = torch.randn(33, 17, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(l1.l1_attention(x, x, x, eps=0.1).pow(2).sum(), x)
    scores = 1 / (0.1 + (x.unsqueeze(-2) - x).abs().sum(-1))
    (naive,) = torch.autograd.grad((torch.softmax(scores, -1) @ x).pow(2).sum(), x)
    torch.testing.assert_close(ours, naive)


def test_attention_expanded_grad():
    """``sum().backward()`` hands over one number, expanded."""
    inputs, _, _ = leaves((2, 33, 17), (31, 17))
    l1.l1_attention(*inputs[:3]).sum().backward()
    ones = torch.ones(2, 33, 3, dtype=torch.float64)
    expected = testing_attention.ExpectedAttention(*(x.detach() for x in inputs[:3]), grad_out=ones)
    expected.assert_gradients(*(x.grad for x in inputs[:3]))


def test_attention_result_changed_in_place():
    """The backward pass reads out."""
    inputs, grad, _ = leaves((33, 17), (31, 17))
    out = l1.l1_attention(*inputs[:3])
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("mask", [None, ("added", (5, 7)), ("bool", (7,))], ids=str)
def test_attention_ops_opcheck(mask, dtype):
    """Schema, fake implementation and tracing of both operators agree with what they do."""
    given = testing_attention.inputs((2, 4, 5, 4), (2, 2, 7, 4), 3, dtype, mask=mask, enable_gqa=True)
    options = (True, 3, 0, "inverse", 0.5, 0.01, None, None)
    inputs = (*given[:4], None, None)
    for keep in (False, True):
        opcheck(torch.ops.l1attn.attention.default, (*inputs, keep, *options))
    out, softmax, unrounded = torch.ops.l1attn.attention(*inputs, True, *options)
    assert (unrounded.numel() > 0) == (dtype == "bfloat16")
    results = (unrounded if dtype == "bfloat16" else out), softmax
    added = mask is not None and mask[0] == "added"
    for need, grad_lse in (((True, True, True, added), given.grad_lse), ((False, True, False, False), None)):
        arguments = (given.grad_out, *inputs, *results, grad_lse, *need, *options)
        opcheck(torch.ops.l1attn.attention_backward.default, arguments)


def test_attention_ops_opcheck_packed():
    """Heads before lengths, as views of what lies the other way round."""
    query, key, value = (torch.randn(n, 2, c).transpose(0, 1) for n, c in ((5, 4), (7, 4), (7, 3)))
    ends = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7])
    options = (False, -1, -1, "inverse", 0.5, 0.01, None, None)
    inputs = (query, key, value, None, *ends)
    opcheck(torch.ops.l1attn.attention.default, (*inputs, True, *options))
    out, softmax, _ = torch.ops.l1attn.attention(*inputs, True, *options)
    arguments = (torch.randn(2, 5, 3), *inputs, out, softmax, None, True, True, True, False, *options)
    opcheck(torch.ops.l1attn.attention_backward.default, arguments)


def network(query, key, value, mask):
    """Attention with all its options between other operations."""
    out, lse = l1.l1_attention(
        query * 2, key, value, mask, 0.0, True, 0.5, True, score="negative", window=(20, 3), return_lse=True
    )
    return out.relu(), lse.sin()


def check_compiled(compiled, *shapes):
    """Results and gradients are those of the same function without compilation."""
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    plain = [array.detach().clone().requires_grad_() for array in ours]
    results = compiled(*ours), network(*plain)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    for result in results:
        sum(x.pow(2).sum() for x in result).backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_attention_compile_traces_without_a_break(backend):
    """``fullgraph``, also with another shape, which is compiled for any size."""
    if backend == "inductor" and not importlib.util.find_spec("torch._inductor"):
        pytest.skip("this torch has no Inductor")
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    check_compiled(compiled, (2, 4, 33, 17), (2, 2, 33, 17), (2, 2, 33, 5), (33, 33))
    check_compiled(compiled, (2, 4, 65, 17), (2, 2, 97, 17), (2, 2, 97, 5), (65, 97))


def test_attention_compile_varlen():
    """The lengths are data: one graph for all of them."""
    query = torch.randn(9, 2, 4, requires_grad=True)

    def call(x, ends):
        return l1.l1_attention_varlen(x, x, x, ends, ends)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 4, 9], [0, 7, 9]):
        ends = torch.tensor(lengths)
        grads = [torch.autograd.grad(function(query, ends).pow(2).sum(), query)[0] for function in (compiled, call)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("ends", [[0, 4, 9], (0, 4, 9), np.array([0, 4, 9])], ids=lambda ends: type(ends).__name__)
def test_attention_compile_varlen_of_constants(ends):
    """Lengths that are no tensor become part of the graph."""
    query = torch.randn(9, 2, 4, requires_grad=True)

    def call(x):
        return l1.l1_attention_varlen(x, x, x, ends, ends)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(function(query).pow(2).sum(), query)[0] for function in (compiled, call)]
    torch.testing.assert_close(*grads)


def test_attention_compile_varlen_wrong_lengths():
    x = torch.randn(9, 2, 4)
    compiled = torch.compile(
        lambda ends: l1.l1_attention_varlen(x, x, x, ends, ends), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the 9 rows of query"):
        compiled([0, 8])
    with pytest.raises(TypeError, match="cu_seqlens_q must be one-dimensional and of integers"):
        compiled([0, 4.5, 9])


def test_attention_fake_tensors():
    """A tensor without data gives results without data, not a read from address 0."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, value = (torch.zeros(2, 4, n, 8, requires_grad=True) for n in (5, 7, 7))
        out, lse = l1.l1_attention(query, key, value, return_lse=True)
        assert (out.shape, lse.shape) == ((2, 4, 5, 8), (2, 4, 5))
        out.sum().backward()
        assert query.grad.shape == query.shape


def test_attention_tensors_with_the_negative_bit():
    """The imaginary part of a conjugate is a view whose numbers are stored with the other sign."""
    z = torch.randn(3, 33, 17, dtype=torch.cfloat)
    key, value = torch.randn(3, 31, 17), torch.randn(3, 31, 5)
    query = z.conj().imag
    assert query.is_neg()
    assert_identical(l1.l1_attention(query, key, value), l1.l1_attention(query.resolve_neg(), key, value))
