"""`l1_attention` of 8-bit query and key, against the formula in float64 on the same integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import SCORES, TORCH_LAYOUTS, assert_identical, to_numpy
from quantized_cases import numbers

import l1attn_cupy as l1
from l1attn_cupy import plan_quantized, testing, testing_attention
from l1attn_cupy.testing_attention import ExpectedAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself

B, V, S = np.zeros((2, 3, 4), np.int8), np.zeros((2, 3, 5), np.float32), np.ones((2, 1, 1), np.float32)

#: What runs kernels, and where its arrays are.
KERNELS = ["emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = {"emulator": "cpu", "cuda": "cuda"}

#: Shapes of query and key, channels of value, kind and shape of a mask, and options.
CASES = {
    "odd sizes": ((33, 31), (65, 31), 5, None, {"score": "negative"}),
    "causal": ((65, 17), (65, 17), 33, None, {"score": "inverse", "is_causal": True}),
    "window": ((33, 64), (97, 64), 64, None, {"score": "laplacian", "window": (5, 9)}),
    "bool mask": ((33, 9), (40, 9), 7, ("bool", (33, 40)), {"score": "distance"}),
    "added mask": ((33, 9), (40, 9), 7, ("added", (40,)), {"score": "inverse"}),
    "few queries, keys in parts": ((1, 33), (2203, 33), 8, None, {"score": "inverse"}),
    "no channels": ((5, 0), (7, 0), 3, None, {"score": "inverse"}),
}


def problem(case, dtype, of_value):
    """Bytes, a scale, value and mask; and what should come of them."""
    query, key, channels_v, mask, options = CASES[case]
    value, added = testing_attention.inputs(query, key, channels_v, of_value, mask=mask)[2:4]
    q, k = (torch.from_numpy(numbers(shape, dtype, seed=n)) for n, shape in enumerate((query, key)))
    quant_scale = torch.full((1, 1), 0.01)
    expected = [x.to(value.dtype) for x in (q, k)]  # which holds them exactly
    call = {"scale": 0.2, **options}
    return (
        (q, k, value, added),
        quant_scale,
        call,
        ExpectedAttention(*expected, value, added, **{**call, "scale": 0.2 * quant_scale.item()}),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of_value", plan_quantized.VALUES)
def test_quantized_attention_error(case, of_value):
    dtype = "uint8" if of_value == "float16" else "int8"
    given, quant_scale, call, expected = problem(case, dtype, of_value)
    out, lse = l1.l1_attention(*given, quant_scale=quant_scale, return_lse=True, **call)
    assert out.dtype is given[2].dtype
    expected.assert_results(out, lse)
    arrays = [None if x is None else to_numpy(x) for x in given]
    again = l1.l1_attention(*arrays, quant_scale=quant_scale.numpy(), **call)
    assert_identical(torch.from_numpy(again.view(np.int16)).view(out.dtype) if of_value == "bfloat16" else again, out)


def test_quantized_attention_shared_heads_and_scales():
    """A scale for each head of key, which the queries that share it take too; and one that is not there is 1."""
    query, key = (torch.from_numpy(numbers(s, "int8", seed=len(s))) for s in ((2, 6, 33, 17), (2, 3, 31, 17)))
    value = torch.randn(2, 3, 31, 7)
    quant_scale = torch.linspace(0.001, 0.02, 6).reshape(2, 3, 1, 1)
    out = l1.l1_attention(query, key, value, enable_gqa=True, quant_scale=quant_scale)
    for b, head in np.ndindex(2, 6):
        own = (query[b, head], key[b, head // 2], value[b, head // 2])
        one = l1.l1_attention(*own, quant_scale=quant_scale[b, head // 2])
        assert_identical(out[b, head], one)
        scale = quant_scale[b, head // 2].item()
        ExpectedAttention(own[0].float(), own[1].float(), own[2], scale=scale).assert_results(one)
    without = l1.l1_attention(query, key, value, enable_gqa=True, scale=0.01)
    ones = torch.ones(3, 1, 1)
    assert_identical(l1.l1_attention(query, key, value, enable_gqa=True, scale=0.01, quant_scale=ones), without)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of_value", plan_quantized.VALUES)
def test_quantized_attention_by_kernels(backend, case, of_value):
    dtype = "uint8" if of_value == "float16" else "int8"
    given, quant_scale, call, expected = problem(case, dtype, of_value)
    *own, own_scale = (None if x is None else x.to(DEVICE[backend]) for x in (*given, quant_scale))
    out, lse = l1.l1_attention(*own, quant_scale=own_scale, return_lse=True, backend=backend, **call)
    assert out.dtype is given[2].dtype
    expected.assert_results(out.cpu(), lse.cpu())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", [layout for layout in TORCH_LAYOUTS if layout != "negative bit"])
def test_quantized_attention_by_kernels_layouts_and_scales(backend, layout):
    """More than one block, tile and chunk of everything; a head of key shared, a scale for each batch entry."""
    query, key = (torch.from_numpy(numbers((2, *s), "int8", seed=len(s))) for s in ((2, 131, 67), (1, 33, 67)))
    value, quant_scale = torch.randn(2, 1, 33, 66), torch.tensor([0.001, 0.02]).reshape(2, 1, 1, 1)
    call = {"score": SCORES[list(TORCH_LAYOUTS).index(layout) % 4], "scale": 0.3, "eps": 0.02}
    arrays = [x.to(DEVICE[backend]) for x in (*map(TORCH_LAYOUTS[layout], (query, key, value)), quant_scale)]
    options = {"quant_scale": arrays.pop(), "enable_gqa": True, "backend": backend, **call}
    out = l1.l1_attention(*arrays, **options)
    assert_identical(l1.l1_attention(*arrays, variant="tiled", **options).cpu(), out.cpu())
    for b, h in np.ndindex(2, 2):
        own = query[b, h].float(), key[b, 0].float(), value[b, 0]
        exact = {**call, "scale": 0.3 * quant_scale[b].item()}
        ExpectedAttention(*own, **exact).assert_results(out[b, h].cpu())


@pytest.mark.parametrize("case", ["causal", "added mask"])
def test_quantized_attention_emulated(case):
    """As of query and key times their scale."""
    (query, key, value, added), quant_scale, call, _ = problem(case, "int8", "float16")
    quant_scale = torch.full((1, 1), 2.0**-7)  # a product with it is exact
    out, lse = l1.l1_attention(
        query, key, value, added, quant_scale=quant_scale, return_lse=True, backend="emulator", **call
    )
    assert out.dtype is torch.float16
    expected = ExpectedAttention((query * quant_scale).half(), (key * quant_scale).half(), value, added, **call)
    expected.assert_results(out, lse)


def test_quantized_attention_emulated_shared_heads():
    """A scale for each head of key, which the queries that share it take too."""
    query, key = (torch.from_numpy(numbers(s, "int8", seed=len(s))) for s in ((2, 4, 9, 17), (2, 2, 11, 17)))
    value, quant_scale = torch.randn(2, 2, 11, 5), torch.tensor([0.5, 2.0**-7]).reshape(2, 1, 1)
    call = {"enable_gqa": True, "scale": 0.2}
    out = l1.l1_attention(query, key, value, quant_scale=quant_scale, backend="emulator", **call)
    scaled = query * quant_scale.repeat_interleave(2, 0), key * quant_scale
    ExpectedAttention(*scaled, value, **call).assert_results(out)


def test_quantized_attention_kernel_with_values_that_are_not_finite():
    """A NaN where a mask rules the key out comes to nothing, elsewhere to NaN of its own channel."""
    query, key = (torch.from_numpy(numbers((n, 17), "uint8", seed=n)) for n in (33, 40))
    value = torch.randn(40, 9)
    mask = torch.ones(33, 40, dtype=torch.bool)
    mask[::2, 7] = False
    clean = l1.l1_attention(query, key, value, mask, scale=0.01, backend="emulator")
    value[7, 3] = torch.nan
    out = l1.l1_attention(query, key, value, mask, scale=0.01, backend="emulator")
    assert out[1::2, 3].isnan().all()
    out[1::2, 3] = clean[1::2, 3]
    torch.testing.assert_close(out, clean)


def test_quantized_attention_variant_is_not_for_bytes():
    with pytest.raises(ValueError, match=r"variant must be one that takes int8 .* for attention_forward, got 'gather'"):
        l1.l1_attention(B, B, V, variant="gather", backend="emulator")


@pytest.mark.parametrize("length_q, length_k", [(0, 5), (5, 0)])
def test_quantized_attention_empty(length_q, length_k):
    """Without a key, 0."""
    out = l1.l1_attention(
        *(np.zeros((2, n, 3), np.int8) for n in (length_q, length_k)), np.ones((2, length_k, 4), "f4")
    )
    assert_identical(out, np.zeros((2, length_q, 4), np.float32))


def test_quantized_attention_nan_scale():
    """A NaN or infinity in query or key is a scale of NaN: all of its matrix is NaN, and no other."""
    query, key, value = torch.randn(3, 5, 4), torch.randn(3, 7, 4), torch.randn(3, 7, 2)
    key[1, 0, 0] = torch.inf
    q8, k8, quant_scale = l1.quantize_for_l1(query, key)
    for score in ("inverse", "negative"):
        out = l1.l1_attention(q8, k8, value, quant_scale=quant_scale, score=score)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_quantized_attention_operator():
    query, key = (torch.from_numpy(numbers((2, n, 17), "int8", seed=n)) for n in (5, 7))
    value, quant_scale = torch.randn(2, 7, 3), torch.tensor([0.1, 0.3]).reshape(2, 1, 1)
    options = (False, -1, -1, "inverse", 1.0, 1e-3, None, None)
    torch.library.opcheck(torch.ops.l1attn.attention_quantized, (query, key, value, None, quant_scale, *options))

    def call(query, key, value, quant_scale):
        return l1.l1_attention(query, key, value, quant_scale=quant_scale, return_lse=True)

    given = query, key, value, quant_scale
    for found, expected in zip(torch.vmap(call)(*given), call(*given), strict=True):
        assert_identical(found, expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*given), call(*given), strict=True):
        assert_identical(found, expected)


def test_quantized_attention_under_autocast():
    """As in autocast's dtype; the scale stays in float32."""
    query, key = (torch.from_numpy(numbers((2, n, 17), "int8", seed=n)) for n in (5, 7))
    value, quant_scale = torch.randn(2, 7, 3), torch.tensor([0.1, 0.3]).reshape(2, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = l1.l1_attention(query, key, value, quant_scale=quant_scale)
    assert_identical(out, l1.l1_attention(query, key, value.bfloat16(), quant_scale=quant_scale))


WRONG = {
    "value of bytes": (
        (B, B, B),
        {},
        TypeError,
        r"value must have one of the dtypes float16, bfloat16, float32, got int8",
    ),
    "value in float64": ((B, B, V.astype("f8")), {}, TypeError, "value must have one of the dtypes .*, got float64"),
    "float key": ((B, V[..., :4], V), {}, TypeError, "key must be int8 or uint8, .* got float32"),
    "length": ((B, B, V[:, :2]), {}, ValueError, "value must have length 3 to match key"),
    "mask": (
        (B, B, V, np.zeros((3, 3), np.float16)),
        {},
        TypeError,
        r"attn_mask must be bool or have value's dtype \(float32\), got float16",
    ),
    "scale's shape": (
        (np.zeros((4, 3, 4), np.int8), B, V),
        {"quant_scale": np.ones((4, 1, 1), np.float32), "enable_gqa": True},
        ValueError,
        r"quant_scale must broadcast to the shape \(2, 1, 1\), .* got \(4, 1, 1\)",
    ),
    "floats": ((V, V, V), {"quant_scale": S}, TypeError, "query must be int8 or uint8, .* got float32"),
    "dropout": ((B, B, V, None, 0.5), {}, NotImplementedError, "dropout_p must be 0.0"),
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("case", WRONG)
def test_quantized_attention_wrong(case, library):
    arguments, options, error, message = WRONG[case]
    if library == "torch":
        arguments = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arguments]
        options = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(error, match=message):
        l1.l1_attention(*arguments, **options)


def test_quantized_attention_has_no_gradient():
    """Not of value either; and no tangent."""
    query, key, value = torch.from_numpy(B), torch.from_numpy(B), torch.from_numpy(V).requires_grad_()
    with pytest.raises(TypeError, match="value must not require a gradient"):
        l1.l1_attention(query, key, value)
    with torch.no_grad():
        l1.l1_attention(query, key, value)
    with pytest.raises(TypeError, match="value must not require a gradient"):
        torch.func.jvp(lambda v: l1.l1_attention(query, key, v), (value.detach(),), (torch.ones_like(value),))
    with pytest.raises(TypeError, match="value must not require a gradient"):
        torch.func.grad(lambda v: l1.l1_attention(query, key, v).sum())(value.detach())


def test_quantized_attention_packed_is_not_built():
    with pytest.raises(TypeError, match=r"query must have one of the dtypes float16, .* got int8"):
        l1.l1_attention_varlen(B, B, V, [0, 2], [0, 2])


def test_quantized_attention_on_one_thread():
    """The same bits as on all."""
    query, key = (torch.from_numpy(numbers((2, n, 64), "int8", seed=n)) for n in (97, 129))
    value = torch.randn(2, 129, 9)
    with testing.one_thread():
        alone = l1.l1_attention(query, key, value, scale=0.01)
    assert_identical(l1.l1_attention(query, key, value, scale=0.01), alone)
