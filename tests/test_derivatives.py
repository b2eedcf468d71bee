"""Second derivatives, forward mode and the transforms of torch.func, beside finite differences and the formula."""

from __future__ import annotations

import pytest
import torch
from cases import BROADCAST, SCORES, TORCH_LAYOUTS, assert_identical
from tangent_cases import assert_tangents, by_kernel, options_of, problem
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import l1attn_cupy as l1
import l1attn_cupy.autograd_attention  # registers the operators
from l1attn_cupy import reference, testing
from l1attn_cupy.cpu import backend

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself

OPTIONS = {"scale": 0.5, "eps": 0.1}
BOTH_MODES = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "fast_mode": True}


def leaves(*shapes):
    """Tensors that require gradients, no two of whose numbers are so close that a small step crosses a kink."""
    generator = torch.Generator().manual_seed(len(shapes))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    query, key = (x.detach().reshape(-1, 1, x.shape[-1]) for x in given[:2])
    assert (query - key.transpose(0, 1)).abs().min() > 1e-5
    return given


def constants(*shapes):
    return [x.detach() for x in leaves(*shapes)]


def scores_of(score):
    return lambda q, k: l1.l1_scores(q, k, score=score, **OPTIONS)


def attention(query, key, value, mask):
    return l1.l1_attention(query, key, value, mask, scale=0.5, return_lse=True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shapes", [((3, 4), (5, 4)), ((2, 1, 3, 4), (2, 5, 4))], ids=str)
def test_derivatives_second(shapes, score):
    """Double backward, and forward mode over backward, against finite differences of the gradients."""
    assert gradgradcheck(scores_of(score), leaves(*shapes), **BOTH_MODES)


@pytest.mark.parametrize("score", SCORES)
def test_derivatives_third(score):
    """The gradient as a function, whose own second derivatives are right."""

    def gradient(*given):
        return torch.autograd.grad(scores_of(score)(*given).pow(2).sum(), given, create_graph=True)

    assert gradgradcheck(gradient, leaves((2, 3), (4, 3)), fast_mode=True)


@pytest.mark.parametrize("score", SCORES)
def test_derivatives_forward_mode(score):
    """Tangents, also batches of them, against finite differences."""
    given = leaves((2, 1, 3, 4), (2, 5, 4))
    assert gradcheck(scores_of(score), given, check_forward_ad=True, check_batched_forward_grad=True)


def test_derivatives_of_self_attention():
    """One tensor as query and key: ties on the diagonal, whose sign is 0 in every derivative."""
    (x, _) = leaves((3, 4), (5, 4))
    assert gradgradcheck(lambda x: l1.l1_scores(x, x, score="laplacian"), x, fast_mode=True)
    tangent = torch.randn_like(x)
    found = []
    for function in FUNCTIONS:
        found.append(torch.func.jvp(lambda x, f=function: f(x, x, eps=0.1), (x.detach(),), (tangent,))[1])
    torch.testing.assert_close(*found)


FUNCTIONS = (l1.l1_scores, reference.l1_scores)


def test_derivatives_gradient_penalty():
    """A loss with a gradient in it: its own gradient is that of the formula."""
    given = leaves((3, 4), (5, 4))
    found = []
    for function in FUNCTIONS:
        loss = function(*given, **OPTIONS).sum()
        (dquery,) = torch.autograd.grad(loss, given[0], create_graph=True)
        found.append(torch.autograd.grad(loss + dquery.pow(2).sum(), given))
    for ours, naive in zip(*found, strict=True):
        torch.testing.assert_close(ours, naive)


def test_derivatives_create_graph_alone():
    """Gradients with a graph that nobody differentiates are the gradients."""
    query, key = leaves((3, 4), (5, 4))
    grad = torch.randn(3, 5, dtype=torch.float64)
    gradients = torch.autograd.grad(l1.l1_scores(query, key), (query, key), grad, create_graph=True)
    for gradient, expected in zip(gradients, l1.l1_scores_backward(grad, query, key), strict=True):
        assert_identical(gradient.detach(), expected)


TANGENT_SHAPES = [((2, 33, 17), (2, 65, 17)), ((129, 1), (1, 1)), ((1, 131), (257, 131)), *BROADCAST[:5]]


@pytest.mark.parametrize("dtype", list(testing.DTYPES))
@pytest.mark.parametrize("score", SCORES)
def test_tangents_error(score, dtype):
    """Within the bound for gradients, with the scores at hand and without."""
    for number, shapes in enumerate(TANGENT_SHAPES):
        given, call = problem(*shapes, dtype), options_of(score, shapes[0][-1])
        assert_tangents(by_kernel(given, **call, saved=number % 2 == 0), given, **call)


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
def test_tangents_layouts(layout):
    """Tensors of any strides, the tangents' own included."""
    query, key, _ = testing.inputs((2, 9, 5), (2, 7, 5), "float32")
    tangents = query.flip(-1), key.flip(-1)
    laid_out = [TORCH_LAYOUTS[layout](x) for x in (query, key, *tangents)]
    scores = TORCH_LAYOUTS[layout](l1.l1_scores(query, key))
    options = ("inverse", 1.0, 1e-3, None, None)
    expected = torch.ops.l1attn.scores_jvp(query, key, *tangents, None, *options)
    assert_identical(torch.ops.l1attn.scores_jvp(*laid_out, scores, *options), expected)


def test_tangents_threads():
    """The same bits on one thread and on several."""
    query, key, _ = testing.inputs((2, 129, 33), (2, 257, 33), "float32")
    options = ("inverse", 1.0, 1e-3, None, None)
    many = torch.ops.l1attn.scores_jvp(query, key, query * 2, key * 3, None, *options)
    with testing.one_thread():
        assert_identical(torch.ops.l1attn.scores_jvp(query, key, query * 2, key * 3, None, *options), many)


def test_tangents_infinite_times_a_tie():
    """A tie does not hide an infinite tangent: 0 times infinity is NaN, as in the formula."""
    query, key = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    tangent = torch.tensor([[torch.inf, 0.0]])
    assert torch.func.jvp(lambda q: l1.l1_scores(q, key), (query,), (tangent,))[1].isnan().all()


@pytest.mark.parametrize(("query", "key"), [((0, 3), (5, 3)), ((4, 3), (0, 3)), ((4, 0), (5, 0))])
def test_tangents_empty(query, key):
    found = torch.func.jvp(l1.l1_scores, (torch.ones(query), torch.ones(key)), (torch.ones(query), torch.ones(key)))
    assert found[1].shape == (query[0], key[0])
    assert not found[1].any()


@pytest.mark.parametrize("name", ["tangent_query", "tangent_key", "scores"])
def test_tangents_wrong_shape(name):
    given = {"query": torch.ones(4, 3), "key": torch.ones(5, 3)}
    given |= {"tangent_query": torch.ones(4, 3), "tangent_key": torch.ones(5, 3), "scores": torch.ones(4, 5)}
    given[name] = torch.ones(7, 3)
    with pytest.raises(ValueError, match=rf"{name} must have the shape .*, got \(7, 3\)"):
        torch.ops.l1attn.scores_jvp(*given.values(), "inverse", 1.0, 1e-3, None, None)


def test_func_grad_and_per_sample_gradients():
    """`vmap` of `grad`, with one key for all samples: the gradients of a loop over samples."""
    query, key = constants((3, 5, 4), (7, 4))

    def loss(q, k):
        return l1.l1_scores(q, k, **OPTIONS).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(query, key)
    for i in range(3):
        for ours, expected in zip(found, torch.func.grad(loss, argnums=(0, 1))(query[i], key), strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-13, atol=0)
    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf, key), leaf)[0].shape, found[0].shape)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2), (-1, 0)], ids=str)
def test_func_vmap(in_dims, monkeypatch):
    """Any dimension, and no loop: the kernel is called once. Query has a batch dimension more than key."""
    calls = []
    launch = backend.scores_forward
    monkeypatch.setattr(backend, "scores_forward", lambda *given: calls.append(launch(*given)))
    query, key = constants((2, 5, 4), (7, 4))
    batched = [
        torch.stack([x, x * 2, x * 3], dim) if dim is not None else x
        for x, dim in zip((query, key), in_dims, strict=True)
    ]
    found = torch.func.vmap(l1.l1_scores, in_dims)(*batched)
    assert len(calls) == 1
    for n in range(3):
        entry = [x if dim is None else x.select(dim, n) for x, dim in zip(batched, in_dims, strict=True)]
        assert_identical(found[n], l1.l1_scores(*entry))


def test_func_vmap_checks_the_entries():
    """What is missing a dimension must not pass because the mapped one stands in for it."""
    with pytest.raises(
        ValueError, match=r"query must have at least 2 dimensions \(..., length, head_dim\), got \(4,\)"
    ):
        torch.func.vmap(l1.l1_scores, (0, None))(torch.ones(3, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"value must have at least 2 dimensions"):
        torch.func.vmap(l1.l1_attention)(torch.ones(3, 2, 4), torch.ones(3, 2, 4), torch.ones(3, 2))


@pytest.mark.parametrize("score", ["inverse", "distance"])
def test_func_nested(score):
    """Transforms of transforms: within the inner one ``requires_grad`` says nothing of the outer."""
    query, key = constants((2, 3), (4, 3))
    tangent = torch.randn_like(query)

    def compositions(function):
        def loss(q):
            return function(q, key, score=score, **OPTIONS).pow(2).sum()

        yield torch.func.hessian(loss)(query)
        yield torch.func.jacrev(torch.func.grad(loss))(query)
        yield torch.func.grad(lambda q: torch.func.jvp(torch.func.grad(loss), (q,), (tangent,))[1].sum())(query)
        yield torch.func.jvp(lambda q: torch.func.jvp(loss, (q,), (tangent,))[1], (query,), (tangent,))[1]
        weighted = torch.func.grad(lambda w, q: (w * function(q, key, score=score, **OPTIONS)).pow(2).sum())
        yield torch.func.grad(lambda q: weighted(key.sum(), q))(query)

    for ours, naive in zip(*map(compositions, FUNCTIONS), strict=True):
        torch.testing.assert_close(ours, naive)


def test_attention_second():
    """Both results, of all inputs, in both modes over backward."""
    shapes = ((2, 3), (3, 3), (3, 2), (2, 3))
    assert gradgradcheck(attention, leaves(*shapes), **BOTH_MODES)


@pytest.mark.parametrize("place", [{"is_causal": True, "enable_gqa": True}, {"window": (1, 0)}], ids=str)
def test_attention_second_places(place):
    shapes = ((4, 3, 4), (2, 3, 4), (2, 3, 2)) if "enable_gqa" in place else ((3, 4), (4, 4), (4, 2))
    assert gradgradcheck(lambda *x: l1.l1_attention(*x, **place), leaves(*shapes), fast_mode=True)


def test_attention_second_varlen():
    def call(*x):
        return l1.l1_attention_varlen(*x, [0, 2, 5], [0, 3, 4], is_causal=True, return_lse=True)

    assert gradgradcheck(call, leaves((5, 2, 3), (4, 2, 3), (4, 2, 2)), **BOTH_MODES)
    assert gradcheck(call, leaves((5, 2, 3), (4, 2, 3), (4, 2, 2)), check_forward_ad=True, fast_mode=True)


def test_attention_forward_mode_varlen_lengths_in_a_tensor():
    """torch.func would wrap a copy of them, whose numbers nobody can read."""
    query, key = constants((5, 2, 3), (5, 2, 3))

    def tangent(ends):
        return torch.func.jvp(lambda q: l1.l1_attention_varlen(q, key, key, ends, ends), (query,), (key,))[1]

    assert_identical(tangent(torch.tensor([0, 2, 5])), tangent([0, 2, 5]))


def test_attention_third():
    def gradient(*given):
        return torch.autograd.grad(l1.l1_attention(*given, eps=0.1).pow(2).sum(), given, create_graph=True)

    assert gradgradcheck(gradient, leaves((2, 3), (3, 3), (3, 2)), fast_mode=True)


def test_attention_forward_mode():
    shapes = ((2, 3, 4), (2, 5, 4), (2, 5, 2), (3, 5))
    assert gradcheck(attention, leaves(*shapes), check_forward_ad=True, check_batched_forward_grad=True)


def test_attention_fully_masked_derivatives():
    """A query without a key has derivatives 0 of every order, not NaN."""
    given = leaves((3, 4), (5, 4), (5, 2))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    gradients = torch.autograd.grad(l1.l1_attention(*given, mask).sum(), given, create_graph=True)
    second = torch.autograd.grad(sum(x.pow(2).sum() for x in gradients), given)
    assert all(x.isfinite().all() for x in (*gradients, *second))
    assert not second[0][1].any()
    assert second[0][0].any()
    tangent = torch.func.jvp(lambda q: l1.l1_attention(q, *given[1:], mask), (given[0],), (given[0],))[1]
    assert not tangent[1].any()
    assert tangent[0].any()


@pytest.mark.parametrize("masked", ["bool", "added", "none"])
def test_attention_per_sample_gradients(masked):
    """`vmap` of `grad` of fused attention, one value for all samples: the gradients of a loop over samples."""
    query, key, value, mask = constants((3, 2, 5, 4), (3, 2, 7, 4), (2, 7, 3), (5, 7))
    mask = {"bool": mask > 0, "added": mask, "none": None}[masked]

    def loss(q, k, v):
        out, lse = l1.l1_attention(q, k, v, mask, return_lse=True)
        return out.pow(2).sum() + lse.sum()

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    found = torch.func.vmap(gradients, in_dims=(0, 0, None))(query, key, value)
    for i in range(3):
        for ours, expected in zip(found, gradients(query[i], key[i], value), strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-12, atol=1e-12)


def test_attention_per_sample_gradients_of_mask_and_packed():
    query, key, value, mask = constants((3, 5, 4), (3, 7, 4), (3, 7, 2), (3, 7))
    gradients = torch.func.grad(lambda m, *x: l1.l1_attention(*x, m).pow(2).sum())
    found = torch.func.vmap(gradients)(mask, query, key, value)
    packed = [x.unsqueeze(2) for x in (query, key, value)]
    varlen = torch.func.grad(lambda *x: l1.l1_attention_varlen(*x, [0, 2, 5], [0, 3, 7]).pow(2).sum())
    found_packed = torch.func.vmap(varlen)(*packed)
    for i in range(3):
        torch.testing.assert_close(found[i], gradients(mask[i], query[i], key[i], value[i]))
        assert_identical(found_packed[i], varlen(*(x[i] for x in packed)))


def test_attention_hessian():
    query, key, value = constants((2, 3), (4, 3), (4, 2))

    def loss(attention):
        return lambda q: attention(q).pow(2).sum()

    ours = torch.func.hessian(loss(lambda q: l1.l1_attention(q, key, value, eps=0.1)))(query)
    naive = torch.func.hessian(loss(lambda q: reference.l1_scores(q, key, eps=0.1).softmax(-1) @ value))(query)
    torch.testing.assert_close(ours, naive)


@pytest.mark.parametrize("call", [l1.l1_scores, lambda q, k: l1.l1_attention(q, k, k)], ids=["scores", "attention"])
def test_compile_transforms_work_or_raise(call):
    """Forward mode and torch.func in what is compiled: outside of the graph, or an error if there must be one graph."""
    query, key = constants((3, 4), (5, 4))
    tangent = torch.randn_like(query)

    def dual(q):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(q, tangent), key)).tangent

    functions = [
        dual,
        lambda q: torch.func.jvp(lambda q: call(q, key), (q,), (tangent,))[1],
        torch.func.grad(lambda q: call(q, key).pow(2).sum()),
    ]
    for function in functions:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="forward_mode_or_transforms"):
            torch.compile(function, backend="aot_eager", fullgraph=True)(query)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(function, backend="aot_eager")(query), function(query))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_function_meets_a_tangent(fullgraph):
    """A graph made without tangents is not used for them."""
    query, key = constants((3, 4), (5, 4))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: l1.l1_scores(q, key), backend="aot_eager", fullgraph=fullgraph)
    compiled(query)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="forward_mode_or_transforms"):
                compiled(dual)
            return
        expected = forward_ad.unpack_dual(l1.l1_scores(dual, key)).tangent
        assert_identical(forward_ad.unpack_dual(compiled(dual)).tangent, expected)


def test_emulator_second_derivatives():
    """Other backends have the operators, so they have what is made of them."""
    shapes = ((2, 3), (3, 3), (3, 2))
    assert gradgradcheck(lambda q, k: l1.l1_scores(q, k, backend="emulator"), leaves(*shapes[:2]), **BOTH_MODES)
    call = {"backend": "emulator", "is_causal": True}
    assert gradgradcheck(lambda *x: l1.l1_attention(*x, **call), leaves(*shapes), fast_mode=True)


def test_emulator_second_derivatives_of_a_variant():
    """A variant that one operator has need not be one of the others."""
    query, key = leaves((3, 4), (5, 4))
    found = []
    for call in ({"backend": "emulator", "variant": "tiled"}, {}):
        (dquery,) = torch.autograd.grad(l1.l1_scores(query, key, **call, **OPTIONS).sum(), query, create_graph=True)
        found.append(torch.autograd.grad(dquery.pow(2).sum(), key)[0])
    torch.testing.assert_close(*found)


BACKWARD = {
    "scores": lambda x: l1.l1_scores_backward(torch.ones(3, 3), x, x)[0],
    "attention": lambda x: l1.l1_attention_backward(x, x, x, x, torch.ones(3, 4), torch.ones(3))[0],
}
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x.expand(2, 3, 4),), (x.expand(2, 3, 4),)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x.expand(2, 3, 4)),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(x.expand(2, 3, 4)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward_functions_are_not_differentiated(name, transform):
    """An error, not zeros; where nothing is differentiated by them they do."""
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=f"l1_{name}_backward cannot be differentiated"):
        TRANSFORMS[transform](BACKWARD[name], x)
    assert torch.func.vmap(BACKWARD[name])(x.expand(2, 3, 4)).shape == (2, 3, 4)
    torch.func.grad(lambda y: (y * BACKWARD[name](x)).sum())(x)
