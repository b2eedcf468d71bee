"""JAX arrays on the CPU: in and out by DLPack, with the bits that NumPy arrays give."""

from __future__ import annotations

import numpy as np
import pytest
from cases import assert_identical

import l1attn_cupy as l1
from l1attn_cupy import arrays, testing, testing_attention

jax = pytest.importorskip("jax", reason="jax is not installed, which takes 380 MB")
jnp = jax.numpy


def attention_inputs() -> list[np.ndarray]:
    """Query, key, value, an added mask and the gradient of the result, with heads that are shared."""
    given = testing_attention.inputs(
        (2, 4, 33, 17), (2, 2, 31, 17), 9, "float32", mask=("added", (33, 31)), enable_gqa=True
    )
    return [array.numpy() for array in given[:5]]


def assert_jax(results, expected) -> None:
    """JAX's own arrays, of the same numbers bit for bit."""
    for result, wanted in zip(results, expected, strict=True):
        assert isinstance(result, jax.Array)
        assert_identical(np.asarray(result), wanted)


def test_jax_scores():
    query, key, grad = [array.numpy() for array in testing.inputs((2, 33, 17), (2, 31, 17), "float32")]
    options = {"score": "laplacian", "scale": 0.1}
    scores = l1.l1_scores(query, key, **options)
    result = l1.l1_scores(jnp.array(query), jnp.array(key), **options)
    assert_jax([result], [scores])
    gradients = l1.l1_scores_backward(*map(jnp.array, (grad, query, key)), scores=result, **options)
    assert_jax(gradients, l1.l1_scores_backward(grad, query, key, scores=scores, **options))


@pytest.mark.parametrize("mask", ["added", "bool", "none"])
def test_jax_attention(mask):
    query, key, value, added, grad = attention_inputs()
    added = {"added": added, "bool": added > 0, "none": None}[mask]
    options = {"enable_gqa": True, "is_causal": True, "window": (9, 0)}
    expected = l1.l1_attention(query, key, value, added, return_lse=True, **options)
    own = [None if array is None else jnp.array(array) for array in (query, key, value, added, grad)]
    result = l1.l1_attention(*own[:4], return_lse=True, **options)
    assert_jax(result, expected)
    options["return_dmask"] = mask == "added"
    gradients = l1.l1_attention_backward(own[4], *own[:3], *result, own[3], **options)
    assert_jax(gradients, l1.l1_attention_backward(grad, query, key, value, *expected, added, **options))


def test_jax_attention_varlen():
    rows = [array.numpy() for array in testing.inputs((33, 1, 5), (33, 1, 5), "float32")][:2]
    ends = [0, 9, 33]
    result = l1.l1_attention_varlen(*map(jnp.array, (rows[0], rows[1], rows[1], ends, ends)))
    assert_jax([result], [l1.l1_attention_varlen(rows[0], rows[1], rows[1], ends, ends)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax_16_bit(dtype):
    tensors = testing.inputs((33, 17), (31, 17), dtype)[:2]
    query, key = (jnp.array(tensor.float().numpy()).astype(dtype) for tensor in tensors)
    result = l1.l1_scores(query, key)
    assert isinstance(result, jax.Array) and result.dtype == dtype
    wanted = l1.l1_scores(*tensors).float().numpy()
    assert_identical(np.asarray(result.astype("float32")), wanted)


def test_jax_is_not_copied():
    query = jnp.ones((33, 17))
    assert arrays.accept("query", query).__array_interface__["data"][0] == query.unsafe_buffer_pointer()


TRANSFORMS = {"jit": jax.jit, "vmap": jax.vmap, "grad": lambda f: jax.grad(lambda *given: f(*given).sum())}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_jax_traced(transform):
    """While JAX traces a function, arrays hold no numbers."""
    query = jnp.ones((2, 33, 17))
    message = r"query must be .*Tracer; inside jax.jit, jax.grad or jax.vmap call it through jax.pure_callback"
    with pytest.raises(TypeError, match=message):
        transform(l1.l1_scores)(query, query)
    with pytest.raises(TypeError, match=message):
        transform(l1.l1_attention)(query, query, query)


def test_jax_deleted():
    query, key = jnp.ones((33, 17)), jnp.ones((31, 17))
    key.delete()
    with pytest.raises(TypeError, match="key must be an array whose memory DLPack can lend, got jaxlib"):
        l1.l1_scores(query, key)


def test_jax_and_numpy_together():
    """The result is of query's library."""
    query, key = np.ones((3, 5), np.float32), jnp.zeros((4, 5))
    assert type(l1.l1_scores(query, key)) is np.ndarray
    assert isinstance(l1.l1_scores(key, query), jax.Array)
