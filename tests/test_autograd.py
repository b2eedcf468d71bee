"""`l1_scores` in torch's autograd, in `torch.compile`, and with tensors that are more than their numbers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cases import BROADCAST, DTYPES, SCORES, assert_identical
from torch.library import opcheck

import l1attn_cupy as l1
from l1attn_cupy import reference, testing
from l1attn_cupy.cpu import backend

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself

OPTIONS = {"score": "inverse", "scale": 0.5, "eps": 0.01}


def leaves(query_shape, key_shape, dtype="float64", **more):
    """Query and key that require gradients, and a gradient of their scores."""
    query, key, grad = testing.inputs(query_shape, key_shape, dtype, **more)
    return query.requires_grad_(), key.requires_grad_(), grad


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shapes", [((3, 4), (5, 4)), *BROADCAST[2:4]], ids=str)
def test_autograd_gradcheck(shapes, score):
    """Against finite differences; no two numbers are so close that a step crosses a kink."""
    small = [(*shape[:-2], min(shape[-2], 3), min(shape[-1], 4)) for shape in shapes]
    query, key, _ = leaves(*small)
    gap = (query.detach().unsqueeze(-2) - key.detach().unsqueeze(-3)).abs().min()
    assert gap > 1e-5
    assert torch.autograd.gradcheck(lambda q, k: l1.l1_scores(q, k, score=score, scale=0.5), (query, key), eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_autograd_is_the_backward_function(score, dtype):
    """``backward()`` gives the bits of `l1_scores_backward` with the saved scores."""
    query, key, grad = leaves((2, 33, 17), (31, 17), dtype)
    scores = l1.l1_scores(query, key, score=score)
    scores.backward(grad)
    expected = l1.l1_scores_backward(grad, query, key, score=score, scores=scores)
    for leaf, gradient in zip((query, key), expected, strict=True):
        assert_identical(leaf.grad, gradient)
        assert not gradient.requires_grad


@pytest.fixture
def computed(monkeypatch):
    """Which gradients the CPU backend is asked for in each call of its backward pass."""
    asked = []
    launch = backend.scores_backward

    def spy(plan, grad, query, key, saved, dquery, dkey):
        asked.append({name for name, out in (("query", dquery), ("key", dkey)) if out is not None})
        launch(plan, grad, query, key, saved, dquery, dkey)

    monkeypatch.setattr(backend, "scores_backward", spy)
    return asked


@pytest.mark.parametrize("needed", [{"query"}, {"key"}, {"query", "key"}], ids=lambda names: "+".join(sorted(names)))
def test_autograd_only_needed_gradients(needed, computed):
    """A frozen key costs nothing."""
    query, key, grad = leaves((33, 17), (31, 17))
    query.requires_grad_("query" in needed)
    key.requires_grad_("key" in needed)
    l1.l1_scores(query, key).backward(grad)
    assert computed == [needed]
    assert {name for name, leaf in (("query", query), ("key", key)) if leaf.grad is not None} == needed


def test_autograd_result_unused(computed):
    """Scores that the loss does not depend on need no backward pass."""
    query, key, _ = leaves((33, 17), (31, 17))
    unused = l1.l1_scores(query, key)
    (query.sum() + key.sum()).backward()
    assert unused.requires_grad
    assert computed == []


def test_autograd_no_grad():
    query, key, _ = leaves((33, 17), (31, 17))
    with torch.no_grad():
        assert not l1.l1_scores(query, key).requires_grad
    with torch.inference_mode():
        assert_identical(l1.l1_scores(query, key), l1.l1_scores(query, key).clone())
    assert not l1.l1_scores(query.detach(), key.detach()).requires_grad


def test_autograd_expanded_grad():
    """``sum().backward()`` hands over one number, expanded."""
    query, key, _ = leaves((2, 33, 17), (31, 17))
    l1.l1_scores(query, key).sum().backward()
    expected = testing.Expected(query, key, torch.ones(2, 33, 31, dtype=torch.float64))
    expected.assert_gradients(query.grad, key.grad)


def test_autograd_same_tensor_twice():
    """Attention of a sequence to itself: both gradients arrive at one tensor."""
    x = torch.randn(33, 17, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(l1.l1_scores(x, x, eps=0.1).sum(), x)
    (naive,) = torch.autograd.grad(reference.l1_scores(x, x, eps=0.1).sum(), x)
    torch.testing.assert_close(ours, naive)


def test_autograd_result_changed_in_place():
    """F' is computed from the result: torch must notice that it was overwritten."""
    query, key, grad = leaves((33, 17), (31, 17))
    scores = l1.l1_scores(query, key)
    scores.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.backward(grad)


def test_autograd_straight_scores_keep_no_result():
    """Where F is straight, nothing of the size of the result is kept, and it may be overwritten."""
    query, key, grad = leaves((33, 17), (31, 17))
    scores = l1.l1_scores(query, key, score="negative")
    scores.mul_(2)
    scores.backward(grad)
    testing.Expected(query, key, 2 * grad, score="negative").assert_gradients(query.grad, key.grad)


def test_compile_gradient_penalty_raises():
    """Compiled, torch itself refuses."""
    query, key, _ = leaves((3, 4), (5, 4))
    loss = torch.compile(l1.l1_scores, backend="aot_eager")(query, key).sum()
    (dquery,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (loss + dquery.pow(2).sum()).backward()


def test_autograd_create_graph_alone_is_fine():
    """Gradients with a graph that nobody differentiates are the gradients."""
    query, key, grad = leaves((3, 4), (5, 4))
    gradients = torch.autograd.grad(l1.l1_scores(query, key), (query, key), grad, create_graph=True)
    for gradient, expected in zip(gradients, l1.l1_scores_backward(grad, query, key), strict=True):
        assert_identical(gradient, expected)


def test_autograd_backward_of_the_backward_function_raises():
    """The results of `l1_scores_backward` are constants, and say so."""
    query, key, grad = leaves((3, 4), (5, 4))
    for gradient in l1.l1_scores_backward(grad.requires_grad_(), query, key):
        assert not gradient.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            gradient.sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("score", SCORES)
def test_ops_opcheck(score, dtype):
    """Schema, fake implementation and tracing of both operators agree with what they do."""
    options = (score, 0.5, 0.01, None, None)
    query, key, grad = testing.inputs((2, 1, 5, 4), (3, 7, 4), dtype)
    scores = l1.l1_scores(query, key, score=score)
    opcheck(torch.ops.l1attn.scores.default, (query, key, *options))
    transposed = key.mT.contiguous().mT
    for need in ((True, True), (True, False), (False, True)):
        for saved in (scores, None):
            arguments = (grad, query, transposed, saved, *need, *options)
            opcheck(torch.ops.l1attn.scores_backward.default, arguments)


def attention(query, key, value):
    scores = l1.l1_scores(query * 2, key, **OPTIONS)
    return torch.softmax(scores, -1) @ value


def check_compiled(compiled, *shapes):
    """Results and gradients are those of the same function without compilation."""
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    plain = [array.detach().clone().requires_grad_() for array in ours]
    result, expected = compiled(*ours), attention(*plain)
    torch.testing.assert_close(result, expected)
    result.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compile_traces_without_a_break():
    """``fullgraph``, also with another shape, which is compiled for any size."""
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    check_compiled(compiled, (2, 33, 17), (2, 31, 17), (2, 31, 5))
    check_compiled(compiled, (2, 65, 17), (2, 97, 17), (2, 97, 5))


def test_compile_dynamic_shapes():
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    check_compiled(compiled, (2, 33, 17), (2, 31, 17), (2, 31, 5))


@pytest.mark.slow
def test_compile_inductor():
    """The default backend, which may hand over tensors with strides of its own."""
    if not importlib.util.find_spec("torch._inductor"):
        pytest.skip("this torch has no Inductor")
    compiled = torch.compile(attention, fullgraph=True)
    check_compiled(compiled, (2, 33, 17), (2, 31, 17), (2, 31, 5))


def test_compile_self_attention():
    """One tensor as query and key."""
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(lambda x: l1.l1_scores(x, x).sum(), fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x), x)[0] for f in (compiled, lambda x: l1.l1_scores(x, x).sum()))
    assert torch.equal(found, expected)


def test_compile_of_a_wrong_call():
    """Compiled or not, the message is ours."""
    compiled = torch.compile(lambda q, k: l1.l1_scores(q, k), backend="aot_eager")
    with pytest.raises(Exception, match="key must have head_dim 4"):
        compiled(torch.zeros(3, 4), torch.zeros(3, 5))


def test_fake_tensors():
    """A tensor without data gives a result without data, not a read from address 0."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.zeros(2, 1, 5, 4, requires_grad=True), torch.zeros(3, 7, 4, requires_grad=True)
        scores = l1.l1_scores(query, key)
        assert scores.shape == (2, 3, 5, 7)
        scores.sum().backward()
        assert query.grad.shape == query.shape
        dquery, dkey = l1.l1_scores_backward(scores.detach(), query, key)
        assert (dquery.shape, dkey.shape) == (query.shape, key.shape)


def test_tensors_with_the_negative_bit():
    """The imaginary part of a conjugate is a view whose numbers are stored with the other sign."""
    z = torch.randn(3, 33, 17, dtype=torch.cfloat)
    query = z.conj().imag
    assert query.is_neg()
    plain = query.resolve_neg()
    key, grad = torch.randn(3, 31, 17), torch.randn(3, 33, 31)
    assert_identical(l1.l1_scores(query, key), l1.l1_scores(plain, key))
    assert_identical(l1.l1_scores(key, query), l1.l1_scores(key, plain))
    expected = l1.l1_scores_backward(grad, plain, key)
    scores = torch._neg_view(-l1.l1_scores(plain, key))
    for saved in (None, scores):
        for result, wanted in zip(l1.l1_scores_backward(grad, query, key, scores=saved), expected, strict=True):
            assert_identical(result, wanted)
    flipped = l1.l1_scores_backward(torch._neg_view(-grad), plain, key)
    for result, wanted in zip(flipped, expected, strict=True):
        assert_identical(result, wanted)


def test_parameter():
    """A parameter gives a plain tensor, and collects its gradient."""
    key = torch.nn.Parameter(torch.randn(31, 17))
    scores = l1.l1_scores(torch.randn(2, 33, 17), key)
    assert type(scores) is torch.Tensor
    scores.sum().backward()
    assert key.grad.shape == key.shape


def test_tensor_subclass():
    """A subclass without behaviour of its own passes through; gradients flow."""

    class Subclass(torch.Tensor):
        pass

    data, key = torch.randn(33, 17), torch.randn(31, 17)
    query = data.as_subclass(Subclass).requires_grad_()
    scores = l1.l1_scores(query, key)
    assert_identical(scores.detach().as_subclass(torch.Tensor), l1.l1_scores(data, key))
    scores.sum().backward()
    assert query.grad.shape == query.shape


def test_hooks_and_accumulation():
    """Two calls on one tensor add up, as any torch function's gradients do."""
    query, key, grad = leaves((33, 17), (31, 17))
    for _ in range(2):
        l1.l1_scores(query, key).backward(grad)
    once = l1.l1_scores_backward(grad, query, key)
    torch.testing.assert_close(query.grad, 2 * once[0])
    torch.testing.assert_close(key.grad, 2 * once[1])
