"""Every wrong call of attention is an error that names the argument, what is required and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from test_plan_errors import WRONG_ARRAYS, WRONG_OPTIONS, WRONG_TENSORS

import l1attn_cupy as l1
import l1attn_cupy.autograd_attention  # registers the operators
from l1attn_cupy import plan_attention

X = np.zeros((3, 4), np.float32)
T = torch.zeros(3, 4)
LIBRARIES = pytest.mark.parametrize("x", [X, T], ids=["numpy", "torch"])


def good(x, **changed):
    """The arguments of `l1_attention_backward`, some of them changed."""
    lse = x[:, 0]
    return {"grad_out": x, "query": x, "key": x, "value": x, "out": x, "lse": lse, **changed}


def zeros(x, *shape):
    return np.zeros(shape, np.float32) if isinstance(x, np.ndarray) else torch.zeros(shape)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_attention_wrong_array(case, name):
    wrong, error, message = WRONG_ARRAYS[case]
    with pytest.raises(error, match=message.format(name=name)):
        l1.l1_attention(**{"query": X, "key": X, "value": X, name: wrong})
    with pytest.raises(error, match=message.format(name=name)):
        l1.l1_attention_backward(**good(X, **{name: wrong}))


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_attention_wrong_tensor(case, name):
    wrong, error, message = WRONG_TENSORS[case]
    with pytest.raises(error, match=message.format(name=name)):
        l1.l1_attention(**{"query": T, "key": T, "value": T, name: wrong})


@LIBRARIES
@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_attention_wrong_option(case, x):
    options, error, message = WRONG_OPTIONS[case]
    if options.get("backend") == "cuda":
        message = "backend 'cuda' takes arrays on a CUDA device"
    with pytest.raises(error, match=message):
        l1.l1_attention(x, x, x, **options)


def heads(x, of_key, of_value):
    """Key and value with so many heads, which queries share."""
    return {"key": zeros(x, of_key, 3, 4), "value": zeros(x, of_value, 3, 4), "enable_gqa": True}


WRONG = {
    "head_dim": (lambda x: {"key": zeros(x, 3, 5)}, "key must have head_dim 4 to match query (3, 4), got (3, 5)"),
    "length of value": (
        lambda x: {"value": zeros(x, 5, 4)},
        "value must have length 3 to match key (3, 4), got (5, 4)",
    ),
    "batch of key": (
        lambda x: {"query": zeros(x, 2, 3, 4), "key": zeros(x, 5, 3, 4)},
        "key must have batch dimensions that broadcast with (2,) to match query (2, 3, 4), got (5, 3, 4)",
    ),
    "batch of value": (
        lambda x: {"query": zeros(x, 2, 3, 4), "value": zeros(x, 5, 3, 4)},
        "value must have batch dimensions that broadcast with (2,) to match query (2, 3, 4), got (5, 3, 4)",
    ),
    "heads without dimension": (
        lambda x: {"enable_gqa": True},
        "query must have at least 3 dimensions (..., heads, length, head_dim) with enable_gqa, got (3, 4)",
    ),
    "heads no multiple": (
        lambda x: {"query": zeros(x, 5, 3, 4), **heads(x, 2, 2)},
        "query must have a multiple of the 2 heads of key (2, 3, 4), got (5, 3, 4)",
    ),
    "heads of value": (
        lambda x: {"query": zeros(x, 4, 3, 4), **heads(x, 2, 1)},
        "value must have 2 heads to match key (2, 3, 4), got (1, 3, 4)",
    ),
    "mask too long": (
        lambda x: {"attn_mask": zeros(x, 3, 4)},
        "attn_mask must broadcast to the shape (3, 3) of the scores, got (3, 4)",
    ),
    "mask with more dimensions": (
        lambda x: {"attn_mask": zeros(x, 1, 3, 3)},
        "attn_mask must broadcast to the shape (3, 3) of the scores, got (1, 3, 3)",
    ),
    "dropout of 2": (lambda x: {"dropout_p": 2}, "dropout_p must be a number from 0 to 1, got 2"),
    "dropout is True": (lambda x: {"dropout_p": True}, "dropout_p must be a number from 0 to 1, got True"),
    "window below -1": (
        lambda x: {"window": (3, -2)},
        "window must have numbers from 0 on, or -1 for no limit, got (3, -2)",
    ),
}
WRONG_TYPES = {
    "mask of integers": (lambda x: {"attn_mask": np.ones((3, 3), np.int64)}, "attn_mask must be bool or have query's"),
    "mask of another float": (lambda x: {"attn_mask": np.ones((3, 3))}, "attn_mask must be bool or have query's dtype"),
    "mask is a list": (lambda x: {"attn_mask": [[True] * 3] * 3}, "attn_mask must be a NumPy .* got list"),
    "value of another dtype": (lambda x: {"value": X.astype(np.float64)}, "value must have query's dtype"),
    "window of floats": (lambda x: {"window": (1.0, 2)}, "window must have whole numbers"),
    "window is a number": (lambda x: {"window": 3}, r"window must be None or \(left, right\), got 3"),
    "window of three": (lambda x: {"window": (1, 2, 3)}, r"window must be None or \(left, right\)"),
    "window of bools": (lambda x: {"window": (True, 2)}, "window must have whole numbers"),
    "causal is a number": (lambda x: {"is_causal": 1}, "is_causal must be True or False, got 1"),
    "gqa is None": (lambda x: {"enable_gqa": None}, "enable_gqa must be True or False, got None"),
}


@LIBRARIES
@pytest.mark.parametrize("case", WRONG)
def test_attention_wrong_value(case, x):
    change, message = WRONG[case]
    arguments = {"query": x, "key": x, "value": x, **change(x)}
    with pytest.raises(ValueError, match=re.escape(message)):
        l1.l1_attention(**arguments)


@LIBRARIES
@pytest.mark.parametrize("case", WRONG_TYPES)
def test_attention_wrong_type(case, x):
    change, message = WRONG_TYPES[case]
    changed = change(x)
    if isinstance(x, torch.Tensor):
        changed = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in changed.items()}
    with pytest.raises(TypeError, match=message):
        l1.l1_attention(**{"query": x, "key": x, "value": x, **changed})


@LIBRARIES
def test_attention_dropout_says_what_to_do(x):
    with pytest.raises(NotImplementedError, match=r"dropout_p must be 0.0.*got 0.1; apply torch.nn.functional.dropout"):
        l1.l1_attention(x, x, x, None, 0.1)


@pytest.mark.parametrize("name", ["key", "value", "attn_mask"])
def test_attention_device_mismatch(name):
    here = plan_attention.ArraySpec("torch", (3, 3), (3, 1), "float32", "cpu")
    specs = {"query": here, "key": here, "value": here, "attn_mask": here, name: here._replace(device="cuda:0")}
    options = plan_attention.option_types(False, False, None, "inverse", 1.0, 1e-3, None, None)
    with pytest.raises(ValueError, match=rf"{name} must be on query's device \(cpu\), got cuda:0"):
        plan_attention.attention([*specs.values()], options)


def test_attention_libraries_mixed():
    for name in ("key", "value", "attn_mask"):
        for x, other, library in ((X, T, "torch"), (T, X, "numpy")):
            wrong = other[:, :3] if name == "attn_mask" else other
            arguments = {"query": x, "key": x, "value": x, name: wrong}
            with pytest.raises(TypeError, match=rf"must come from the same library as query|got {library}"):
                l1.l1_attention(**arguments)


@LIBRARIES
@pytest.mark.parametrize("name", ["grad_out", "out", "lse", "grad_lse"])
def test_attention_backward_wrong_shape(name, x):
    for shape in ((2, 4), (3, 1), (1, 3, 4), (2,)):
        with pytest.raises(ValueError, match=rf"{name} must have .*, got {re.escape(str(shape))}"):
            l1.l1_attention_backward(**good(x, **{name: zeros(x, *shape)}))


@LIBRARIES
@pytest.mark.parametrize("name", ["grad_out", "out", "lse", "grad_lse"])
def test_attention_backward_wrong_dtype(name, x):
    fitting = good(x, grad_lse=x[:, 0])[name]
    wrong = fitting.astype(np.float16) if isinstance(x, np.ndarray) else fitting.half()
    with pytest.raises(TypeError, match=rf"{name} must have .*float32.*, got float16"):
        l1.l1_attention_backward(**good(x, **{name: wrong}))


@LIBRARIES
@pytest.mark.parametrize("name", ["grad_out", "out", "lse"])
def test_attention_backward_array_is_none(name, x):
    with pytest.raises(TypeError, match=rf"{name} must be a NumPy .* array that speaks DLPack, got NoneType"):
        l1.l1_attention_backward(**good(x, **{name: None}))


@LIBRARIES
def test_attention_backward_gradient_of_no_mask(x):
    with pytest.raises(ValueError, match="return_dmask needs an attn_mask that is added to the scores, got None"):
        l1.l1_attention_backward(**good(x), return_dmask=True)
    with pytest.raises(ValueError, match=r"return_dmask needs .*, got a bool mask"):
        l1.l1_attention_backward(**good(x), attn_mask=x[:, :3] == 0, return_dmask=True)


PACKED = {
    "start": ([1, 3], [0, 3], "cu_seqlens_q must rise from 0 to the 3 rows of query, got [1, 3]"),
    "end": ([0, 3], [0, 2], "cu_seqlens_k must rise from 0 to the 3 rows of key, got [0, 2]"),
    "falling": ([0, 2, 1, 3], [0, 1, 2, 3], "cu_seqlens_q must rise from 0 to the 3 rows of query, got [0, 2, 1, 3]"),
    "number": ([0, 3], [0, 1, 3], "cu_seqlens_k must be of as many sequences as cu_seqlens_q, 1, got 2"),
    "none": ([], [0, 3], "cu_seqlens_q must rise from 0 to the 3 rows of query, got []"),
}


@LIBRARIES
@pytest.mark.parametrize("case", PACKED)
def test_varlen_wrong_lengths(case, x):
    ends_q, ends_k, message = PACKED[case]
    packed = x[:, None]
    with pytest.raises(ValueError, match=re.escape(message)):
        l1.l1_attention_varlen(packed, packed, packed, ends_q, ends_k)


@LIBRARIES
@pytest.mark.parametrize("wrong", [[0.0, 3.0], np.array([0.0, 3.0]), torch.tensor([[0, 3]]), None, 3], ids=str)
def test_varlen_lengths_of_wrong_type(wrong, x):
    with pytest.raises(TypeError, match="cu_seqlens_k must be one-dimensional and of integers"):
        l1.l1_attention_varlen(x[:, None], x[:, None], x[:, None], [0, 3], wrong)


@LIBRARIES
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_varlen_wrong_dimensions(name, x):
    arguments = {"query": x[:, None], "key": x[:, None], "value": x[:, None], name: x}
    with pytest.raises(ValueError, match=rf"{name} must have 3 dimensions \(total, heads, head_dim\), got \(3, 4\)"):
        l1.l1_attention_varlen(**arguments, cu_seqlens_q=[0, 3], cu_seqlens_k=[0, 3])


VARLEN_SHAPES = {
    "head_dim": ((9, 2, 5), (9, 2, 4), "key must have head_dim 4 to match query (9, 2, 4), got (9, 2, 5)"),
    "length": ((9, 2, 4), (8, 2, 4), "value must have length 9 to match key (9, 2, 4), got (8, 2, 4)"),
    "heads": (
        (9, 3, 4),
        (9, 2, 4),
        "key must have heads that broadcast with 2 to match query (9, 2, 4), got (9, 3, 4)",
    ),
}


@LIBRARIES
@pytest.mark.parametrize("case", VARLEN_SHAPES)
def test_varlen_messages_show_the_shapes_that_were_given(case, x):
    key, value, message = VARLEN_SHAPES[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        l1.l1_attention_varlen(zeros(x, 9, 2, 4), zeros(x, *key), zeros(x, *value), [0, 9], [0, 9])


@LIBRARIES
def test_varlen_shared_heads_messages_show_the_shapes_that_were_given(x):
    packed = zeros(x, 9, 3, 4), zeros(x, 9, 2, 4), zeros(x, 9, 2, 4)
    message = "query must have a multiple of the 2 heads of key (9, 2, 4), got (9, 3, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        l1.l1_attention_varlen(*packed, [0, 9], [0, 9], enable_gqa=True)


@LIBRARIES
def test_attention_shared_heads_messages_show_the_shapes_that_were_given(x):
    query, key = zeros(x, 2, 4, 5, 4), zeros(x, 3, 2, 7, 4)
    message = "key must have batch dimensions that broadcast with (2,) to match query (2, 4, 5, 4), got (3, 2, 7, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        l1.l1_attention(query, key, key, enable_gqa=True)


@LIBRARIES
def test_attention_shared_heads_of_no_heads(x):
    """As scaled_dot_product_attention; but no keys cannot be shared by some heads."""
    none, two = zeros(x, 2, 0, 5, 4), zeros(x, 2, 2, 7, 4)
    for key in (two, two[:, :0]):
        assert l1.l1_attention(none, key, key, enable_gqa=True).shape == (2, 0, 5, 4)
    with pytest.raises(ValueError, match="query must have a multiple of the 0 heads of key"):
        l1.l1_attention(two, none, none, enable_gqa=True)


@LIBRARIES
def test_attention_flags_of_wrong_type(x):
    for flag in (1, None, "yes"):
        with pytest.raises(TypeError, match=f"return_lse must be True or False, got {flag!r}"):
            l1.l1_attention(x, x, x, return_lse=flag)
        with pytest.raises(TypeError, match=f"return_lse must be True or False, got {flag!r}"):
            l1.l1_attention_varlen(x[:, None], x[:, None], x[:, None], [0, 3], [0, 3], return_lse=flag)
        with pytest.raises(TypeError, match=f"return_dmask must be True or False, got {flag!r}"):
            l1.l1_attention_backward(**good(x), return_dmask=flag)


@LIBRARIES
def test_attention_scale_none(x):
    """It means something else in scaled_dot_product_attention than our default."""
    with pytest.raises(TypeError, match=r"scale must be .*, got NoneType None; .* scale=query.shape\[-1\] \*\* -0.5"):
        l1.l1_attention(x, x, x, scale=None)


def test_window_beyond_any_length_is_no_limit():
    query, key, value = (torch.zeros(n, 2) for n in (3, 4, 4))
    out = l1.l1_attention(query, key, value, window=(2**70, 2**31))
    assert torch.equal(out, l1.l1_attention(query, key, value))


QUANTIZED = torch.quantize_per_tensor(torch.tensor([0.0, 3.0]), 1.0, 0, torch.qint32)


@pytest.mark.parametrize(
    "ends",
    [torch.tensor([0, 3]).bfloat16(), torch.tensor([0.0, 3.0]), torch.tensor([0, 3j]).imag, QUANTIZED],
    ids=["bfloat16", "float32", "negative bit", "qint32"],
)
def test_cu_seqlens_of_other_dtypes(ends):
    x = torch.zeros(3, 1, 2)
    with pytest.raises(TypeError, match="cu_seqlens_q must be one-dimensional and of integers, got a tensor of"):
        l1.l1_attention_varlen(x, x, x, ends, [0, 3])


def test_cu_seqlens_are_not_mapped_over():
    x, ends = torch.zeros(2, 3, 1, 2), torch.tensor([[0, 3], [0, 3]])
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be the same for all that .* maps over"):
        torch.func.vmap(lambda x, ends: l1.l1_attention_varlen(x, x, x, ends, ends))(x, ends)


def test_varlen_nested():
    nested, x = torch.nested.nested_tensor([torch.zeros(2, 1, 2)]), torch.zeros(3, 1, 2)
    with pytest.raises(TypeError, match="query must be a dense array, got a nested one"):
        l1.l1_attention_varlen(nested, x, x, [0, 3], [0, 3])


def test_cu_seqlens_of_any_sequence_but_not_of_bools():
    x = torch.randn(6, 1, 2)
    ends = range(0, 7, 3)
    assert torch.equal(
        l1.l1_attention_varlen(x, x, x, ends, ends), l1.l1_attention_varlen(x, x, x, [0, 3, 6], [0, 3, 6])
    )
    with pytest.raises(TypeError, match="cu_seqlens_q must be one-dimensional and of integers"):
        l1.l1_attention_varlen(x[:1], x[:1], x[:1], [False, True], [0, 1])


def by_name(needed=(True, True, True, False), **changed):
    """Gradients by the name of the operator, some arguments changed; softmax is in float32, of shape (..., L, 2)."""
    given = {"grad_out": T, "query": T, "key": T, "value": T, "attn_mask": None, "cu_seqlens_q": None}
    given |= {"cu_seqlens_k": None, "out": T, "softmax": torch.ones(3, 2), "grad_lse": None}
    options = {"enable_gqa": False, "window_left": -1, "window_right": -1, "score": "inverse", "scale": 1.0}
    options |= {"eps": 1e-3, "backend": None, "variant": None}
    needs = dict(zip(("need_query", "need_key", "need_value", "need_mask"), needed, strict=True))
    return torch.ops.l1attn.attention_backward(**{**given, **needs, **options, **changed})


def forward_by_name(**changed):
    given = {"query": T, "key": T, "value": T, "attn_mask": None, "cu_seqlens_q": None, "cu_seqlens_k": None}
    options = {"keep": False, "enable_gqa": False, "window_left": -1, "window_right": -1, "score": "inverse"}
    options |= {"scale": 1.0, "eps": 1e-3, "backend": None, "variant": None}
    return torch.ops.l1attn.attention(**{**given, **options, **changed})


@pytest.mark.parametrize("mask, got", [(None, "None"), (torch.ones(3, 3, dtype=torch.bool), "a bool mask")])
def test_attention_operator_gradient_of_no_mask(mask, got):
    """Kernels would write floats into an array of bools, beyond its end."""
    with pytest.raises(ValueError, match=f"need_mask needs an attn_mask that is added to the scores, got {got}"):
        by_name(needed=(True,) * 4, attn_mask=mask)


SOFTMAX = {
    "dtype": (torch.ones(3, 2).double(), TypeError, "softmax must have dtype float32, got float64"),
    "one part": (torch.ones(3, 1), ValueError, "softmax must have the shape (3, 2), got (3, 1)"),
    "rows": (torch.ones(4, 2), ValueError, "softmax must have the shape (3, 2), got (4, 2)"),
    "scalar": (torch.ones(()), ValueError, "softmax must have at least 2 dimensions (..., query length, 2), got ()"),
}


@pytest.mark.parametrize("case", SOFTMAX)
def test_attention_operator_wrong_softmax(case):
    """Of another dtype or shape it would be read beyond its end."""
    wrong, error, message = SOFTMAX[case]
    with pytest.raises(error, match=re.escape(message)):
        by_name(softmax=wrong)


@pytest.mark.parametrize("call", [forward_by_name, by_name])
def test_attention_operator_lengths_of_one_side(call):
    packed = dict.fromkeys(("query", "key", "value"), T[None])
    ends = torch.tensor([0, 3])
    for name, missing in (("cu_seqlens_q", "cu_seqlens_k"), ("cu_seqlens_k", "cu_seqlens_q")):
        with pytest.raises(TypeError, match=f"{missing} must be given where the other lengths are, got None"):
            call(**packed, **{name: ends})


@pytest.mark.parametrize("call", [forward_by_name, by_name])
@pytest.mark.parametrize("name", ["window_left", "window_right"])
def test_attention_operator_wrong_window(name, call):
    with pytest.raises(ValueError, match=f"{name} must be a number from 0 on, or -1 for no limit, got -3"):
        call(**{name: -3})


def in_forward_mode(call, query):
    return torch.func.jvp(call, (query,), (torch.ones_like(query),))


FORWARD_MODE = {
    "mask of integers": ({"attn_mask": torch.ones(3, 3).int()}, "attn_mask must be bool or have query's dtype"),
    "mask of another float": ({"attn_mask": torch.ones(3, 3).double()}, "attn_mask must be bool or have query's"),
    "key of another dtype": ({"key": T.double()}, "key must have query's dtype"),
    "value of another dtype": ({"value": T.double()}, "value must have query's dtype"),
    "one value": ({"value": T[:1]}, "value must have length 3 to match key"),
    "variant on cpu": ({"variant": "x"}, "variant must be None on the cpu backend"),
    "variant": ({"variant": "x", "backend": "emulator"}, "variant must be None or one of .* for attention_forward"),
}


@pytest.mark.parametrize("case", FORWARD_MODE)
def test_attention_forward_mode_wrong_argument(case):
    """It is composed of other operations, to which these would be right."""
    changed, message = FORWARD_MODE[case]
    given = {"key": T, "value": T, **changed}
    with pytest.raises((TypeError, ValueError), match=message):
        in_forward_mode(lambda query: l1.l1_attention(query, **given), T)
    with pytest.raises((TypeError, ValueError), match=message):  # the same as without tangents
        l1.l1_attention(T, **given)


@pytest.mark.parametrize("case", WRONG)
def test_attention_forward_mode_wrong_value(case):
    change, message = WRONG[case]
    given = {"query": T, "key": T, "value": T, **change(T)}
    query = given.pop("query")
    with pytest.raises(ValueError, match=re.escape(message)):
        in_forward_mode(lambda query: l1.l1_attention(query, **given), query)


@pytest.mark.parametrize("case", PACKED)
def test_varlen_forward_mode_wrong_lengths(case):
    ends_q, ends_k, message = PACKED[case]
    packed = T[:, None]
    with pytest.raises(ValueError, match=re.escape(message)):
        in_forward_mode(lambda query: l1.l1_attention_varlen(query, packed, packed, ends_q, ends_k), packed)


def test_varlen_forward_mode_messages_show_the_shapes_that_were_given():
    key, value, message = VARLEN_SHAPES["heads"]
    key, value = zeros(T, *key), zeros(T, *value)
    with pytest.raises(ValueError, match=re.escape(message)):
        in_forward_mode(lambda query: l1.l1_attention_varlen(query, key, value, [0, 9], [0, 9]), zeros(T, 9, 2, 4))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_batch_that_does_not_broadcast_in_a_compiled_graph(shared, dynamic):
    """Sizes may be symbols there."""
    shapes = ((2, 4, 5, 4), (3, 2, 7, 4)) if shared else ((2, 3, 5, 4), (2, 2, 7, 4))
    query, key = (zeros(T, *shape) for shape in shapes)

    def call(q, k):
        return l1.l1_attention(q, k, k, enable_gqa=shared)

    call = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pytest.raises(Exception, match=r"key must have batch dimensions that broadcast with .* to match query \("):
        call(query, key)


def test_varlen_heads_that_do_not_broadcast_in_a_compiled_graph():
    key, value, message = VARLEN_SHAPES["heads"]
    given = zeros(T, 9, 2, 4), zeros(T, *key), zeros(T, *value)
    ends = torch.tensor([0, 9])
    call = torch.compile(l1.l1_attention_varlen, fullgraph=True, backend="aot_eager", dynamic=False)
    with pytest.raises(Exception, match=re.escape(message)):
        call(*given, ends, ends)


def test_attention_vector_in_a_compiled_graph():
    call = torch.compile(l1.l1_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"value must have at least 2 dimensions \(\.\.\., length, head_dim\), got \(3,\)"
    ):
        call(T, T, torch.zeros(3))


def test_attention_batch_of_a_size_that_depends_on_data():
    """Of which a graph knows nothing, so that nothing may be asked of it."""
    query, chosen = torch.randn(3, 2, 5, 4), torch.tensor([True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for function in (l1.l1_scores, lambda q, k: l1.l1_attention(q, k, k)):

            def call(x, chosen, function=function):
                return function(x[chosen], x[:1])

            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(query, chosen), call(query, chosen), rtol=0, atol=0)


TOO_LARGE = {
    "uint64": (np.array([0, 2**63 + 3], np.uint64), 2**63 + 3),
    "list": ([0, 2**70], 2**70),
    "negative": ([-(2**70), 3], -(2**70)),
}


@LIBRARIES
@pytest.mark.parametrize("case", TOO_LARGE)
def test_varlen_lengths_beyond_int64(case, x):
    ends, number = TOO_LARGE[case]
    with pytest.raises(ValueError, match=f"cu_seqlens_k must have numbers that int64 holds, got {number}"):
        l1.l1_attention_varlen(x[:, None], x[:, None], x[:, None], [0, 3], ends)


def test_varlen_lengths_without_data():
    for wrong, message in (
        (torch.tensor([0, 3], device="meta"), "cu_seqlens_q must hold data, got a tensor on the meta device"),
        (torch.tensor([0, 3]).to_sparse(), "cu_seqlens_q must be a dense array, got a sparse_coo one"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            l1.l1_attention_varlen(T[:, None], T[:, None], T[:, None], wrong, [0, 3])
