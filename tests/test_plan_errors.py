"""Every wrong call is a TypeError or ValueError that names the argument, what is required and what came."""

from __future__ import annotations

import decimal
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import SCORES

import l1attn_cupy as l1
from l1attn_cupy import arrays, plan, reference
from l1attn_cupy.functions import CURVED

X = np.zeros((3, 4), np.float32)
T = torch.zeros(3, 4)


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Without torch's warnings that such tensors are a prototype or deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


WRONG_ARRAYS = {
    "None": (None, TypeError, "{name} must be a NumPy .* array that speaks DLPack, got NoneType"),
    "list": ([[0.0]], TypeError, "{name} must be a NumPy .* array that speaks DLPack, got list"),
    "number": (1.5, TypeError, "{name} must be a NumPy .* array that speaks DLPack, got float"),
    "numpy scalar": (np.float32(1), TypeError, "{name} must be a NumPy .* array that speaks DLPack, got numpy.float32"),
    "string": ("x", TypeError, "{name} must be a NumPy .* array that speaks DLPack, got str"),
    "masked": (np.ma.masked_array(X, X == 0), TypeError, "{name} must be a dense array, got a masked one"),
    "byte-swapped masked": (
        np.ma.masked_array(X.astype(">f4"), X == 0),
        TypeError,
        "{name} must be a dense array, got a masked one",
    ),
    "int64": (X.astype(np.int64), TypeError, "{name} must have one of the dtypes float16, .* got int64"),
    "bool": (X.astype(bool), TypeError, "{name} must have one of the dtypes .*, got bool"),
    "complex": (X.astype(np.complex64), TypeError, "{name} must have one of the dtypes .*, got complex64"),
    "object": (X.astype(object), TypeError, "{name} must have one of the dtypes .*, got object"),
    "long double": (
        X.astype(np.longdouble),
        TypeError,
        f"{{name}} must have one of the dtypes .*, got {np.dtype(np.longdouble).name}",
    ),
    "1-d": (np.zeros(4, np.float32), ValueError, r"{name} must have at least 2 dimensions .*, got \(4,\)"),
    "0-d": (np.zeros((), np.float32), ValueError, r"{name} must have at least 2 dimensions .*, got \(\)"),
}

WRONG_TENSORS = {
    "int64": (T.long(), TypeError, "{name} must have one of the dtypes float16, .* got int64"),
    "bool": (T.bool(), TypeError, "{name} must have one of the dtypes .*, got bool"),
    "complex": (T.cfloat(), TypeError, "{name} must have one of the dtypes .*, got complex64"),
    "float8": (T.to(torch.float8_e5m2), TypeError, "{name} must have one of the dtypes .*, got float8_e5m2"),
    "quantized": (
        quietly(torch.quantize_per_tensor, T, 0.1, 0, torch.qint8),
        TypeError,
        "{name} must have one of the dtypes .*, got qint8",
    ),
    "sparse": (T.to_sparse(), TypeError, "{name} must be a dense array, got a sparse_coo one; convert it"),
    "sparse rows": (quietly(T.to_sparse_csr), TypeError, "{name} must be a dense array, got a sparse_csr one"),
    "nested": (
        quietly(torch.nested.nested_tensor, [T, T[:2]]),
        TypeError,
        "{name} must be a dense array, got a nested one",
    ),
    "1-d": (T[0], ValueError, r"{name} must have at least 2 dimensions .*, got \(4,\)"),
    "0-d": (T[0, 0], ValueError, r"{name} must have at least 2 dimensions .*, got \(\)"),
}

WRONG_OPTIONS = {
    "unknown score": (
        {"score": "cosine"},
        ValueError,
        "score must be one of 'inverse', 'negative', 'laplacian', 'distance', got 'cosine'",
    ),
    "score in capitals": ({"score": "Inverse"}, ValueError, "score must be one of .*, got 'Inverse'"),
    "score is None": ({"score": None}, TypeError, "score must be a string, got None"),
    "score is a list": ({"score": ["inverse"]}, TypeError, r"score must be a string, got \['inverse'\]"),
    "score is a number": ({"score": 1}, TypeError, "score must be a string, got 1"),
    "scale is a string": ({"scale": "1"}, TypeError, "scale must be a positive finite number, got str '1'"),
    "scale is None": ({"scale": None}, TypeError, "scale must be a positive finite number, got NoneType"),
    "scale is a list": ({"scale": [1.0]}, TypeError, "scale must be a positive finite number, got list"),
    "scale is a bool": ({"scale": True}, TypeError, "scale must be a positive finite number, got bool True"),
    "scale is a NumPy bool": ({"scale": np.True_}, TypeError, "scale must be a positive .*, got bool"),
    "scale is complex": ({"scale": 1j}, TypeError, "scale must be a positive finite number, got complex"),
    "scale is a decimal": ({"scale": decimal.Decimal(1)}, TypeError, "scale must be .*, got Decimal"),
    "scale is a tensor": (
        {"scale": torch.tensor(2.0)},
        TypeError,
        r"scale must be a positive finite number, got Tensor tensor\(2\.\)",
    ),
    "scale is an array": ({"scale": np.ones(1)}, TypeError, "scale must be .*, got ndarray"),
    "scale is 0": ({"scale": 0}, ValueError, "scale must be a positive finite number, got 0"),
    "scale is negative": ({"scale": -1.0}, ValueError, "scale must be a positive finite number, got -1.0"),
    "scale is infinite": ({"scale": math.inf}, ValueError, "scale must be a positive .*, got inf"),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale must be a positive finite number, got nan"),
    "scale is huge": ({"scale": 10**400}, ValueError, "scale must be a positive finite number, got 1000"),
    "eps is 0": ({"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
    "eps is negative": ({"eps": -1e-3}, ValueError, "eps must be a positive finite number, got -0.001"),
    "eps is NaN": ({"eps": np.float32("nan")}, ValueError, "eps must be a positive finite number, got"),
    "eps is None": ({"eps": None}, TypeError, "eps must be a positive finite number, got NoneType None"),
    "unknown backend": (
        {"backend": "gpu"},
        ValueError,
        "backend must be None or one of 'cpu', 'cuda', 'emulator', got 'gpu'",
    ),
    "backend is a number": ({"backend": 0}, TypeError, "backend must be a string or None, got 0"),
    "backend is a list": ({"backend": ["cpu"]}, TypeError, r"backend must be a string or None, got \['cpu'\]"),
    "cuda backend": ({"backend": "cuda"}, ValueError, "backend 'cuda' takes arrays on a CUDA device, got query on"),
    "variant": ({"variant": "tiled"}, ValueError, "variant must be None on the cpu backend, .*, got 'tiled'"),
    "variant is a number": ({"variant": 1}, TypeError, "variant must be a string or None, got 1"),
}


def backward_of(query, key, **call):
    """`l1_scores_backward` with a gradient that fits a good query and key."""
    grad = torch.zeros(3, 3) if isinstance(query, torch.Tensor) or isinstance(key, torch.Tensor) else X[:, :3]
    return l1.l1_scores_backward(grad, query, key, **call)


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_scores_wrong_array(case, name, call):
    wrong, error, message = WRONG_ARRAYS[case]
    with pytest.raises(error, match=message.format(name=name)):
        call(**{"query": X, "key": X, name: wrong})


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_scores_wrong_tensor(case, name, call):
    wrong, error, message = WRONG_TENSORS[case]
    with pytest.raises(error, match=message.format(name=name)):
        call(**{"query": T, "key": T, name: wrong})


@pytest.mark.parametrize("name", ["grad_scores", "scores"])
@pytest.mark.parametrize("case", sorted(WRONG_ARRAYS.keys() - {"None"}))
def test_scores_backward_wrong_array(case, name):
    wrong, error, message = WRONG_ARRAYS[case]
    with pytest.raises(error, match=message.format(name=name)):
        l1.l1_scores_backward(**{"grad_scores": X[:, :3], "query": X, "key": X, name: wrong})


@pytest.mark.parametrize("name", ["grad_scores", "scores"])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_scores_backward_wrong_tensor(case, name):
    wrong, error, message = WRONG_TENSORS[case]
    with pytest.raises(error, match=message.format(name=name)):
        l1.l1_scores_backward(**{"grad_scores": T[:, :3], "query": T, "key": T, name: wrong})


def test_scores_backward_grad_is_none():
    for x in (X, T):
        with pytest.raises(TypeError, match=r"grad_scores must be a NumPy .* array that speaks DLPack, got NoneType"):
            l1.l1_scores_backward(None, x, x)


@pytest.mark.parametrize("x", [X, T], ids=["numpy", "torch"])
@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_scores_wrong_option(case, call, x):
    options, error, message = WRONG_OPTIONS[case]
    with pytest.raises(error, match=message):
        call(x, x, **options)


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
def test_scores_head_dim_mismatch(call):
    message = "key must have head_dim 4 to match query (3, 4), got (3, 5)"
    for key in (np.zeros((3, 5), np.float32), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(key[:, :4], key)


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
def test_scores_batch_does_not_broadcast(call):
    query, key = np.zeros((2, 3, 5, 4), np.float32), np.zeros((2, 5, 4), np.float32)
    message = "key must have batch dimensions that broadcast with (2, 3) to match query (2, 3, 5, 4), got (2, 5, 4)"
    for pair in ((query, key), (torch.from_numpy(query), torch.from_numpy(key))):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(*pair)


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
def test_scores_empty_batch_does_not_broadcast(call):
    """0 broadcasts with 1 alone."""
    with pytest.raises(ValueError, match="key must have batch dimensions that broadcast"):
        call(np.zeros((0, 3, 4)), np.zeros((2, 3, 4)))


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
def test_scores_dtype_mismatch(call):
    for key in (X.astype(np.float64), T.double()):
        query = X if isinstance(key, np.ndarray) else T
        with pytest.raises(TypeError, match=r"key must have query's dtype \(float32\), got float64"):
            call(query, key)


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
def test_scores_libraries_mixed(call):
    """NumPy beside torch: neither is converted silently."""
    with pytest.raises(TypeError, match=r"key must come from the same library as query \(torch\), got numpy"):
        call(T, X)
    with pytest.raises(TypeError, match=r"key must come from the same library as query \(numpy\), got torch"):
        call(X, T)


@pytest.mark.parametrize("name", ["grad_scores", "scores"])
def test_scores_backward_libraries_mixed(name):
    for x, other, library in ((X, T, "torch"), (T, X, "numpy")):
        arguments = {"grad_scores": x[:, :3], "query": x, "key": x, name: other[:, :3]}
        with pytest.raises(TypeError, match=rf"{name} must come from the same library as query .*, got {library}"):
            l1.l1_scores_backward(**arguments)


@pytest.mark.parametrize("name", ["grad_scores", "scores"])
@pytest.mark.parametrize("shape", [(3, 4), (1, 3), (1, 3, 3), (3,), ()], ids=str)
def test_scores_backward_wrong_shape(shape, name):
    """What broadcasts to the shape of the scores is wrong too: expand it, then it is clear what is meant."""
    for x, wrong in ((X, np.zeros(shape, np.float32)), (T, torch.zeros(shape))):
        arguments = {"grad_scores": x[:, :3], "query": x, "key": x, name: wrong}
        wanted = f"{name} must have .*, got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=wanted):
            l1.l1_scores_backward(**arguments)


def test_scores_backward_wrong_shape_names_all():
    message = "grad_scores must have the shape (3, 3) of the scores of query (3, 4) and key (3, 4), got (3, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        l1.l1_scores_backward(X, X, X)


@pytest.mark.parametrize("name", ["grad_scores", "scores"])
def test_scores_backward_wrong_dtype(name):
    arguments = {"grad_scores": X[:, :3], "query": X, "key": X, name: X[:, :3].astype(np.float16)}
    with pytest.raises(TypeError, match=rf"{name} must have query's dtype \(float32\), got float16"):
        l1.l1_scores_backward(**arguments)


@pytest.mark.parametrize("call", [l1.l1_scores, backward_of])
@pytest.mark.parametrize("name", ["query", "key"])
def test_scores_meta_tensor(name, call):
    message = f"{name} must hold data, got a tensor on the meta device"
    with pytest.raises(ValueError, match=message):
        call(**{"query": T, "key": T, name: T.to("meta")})


def spec(device: str, *shape: int) -> plan.ArraySpec:
    """What a plan is told of a tensor; of one on a GPU too, where there is none."""
    return plan.ArraySpec("torch", shape, (shape[-1], 1), "float32", device)


def plan_for(query: str, key: str, backend: str | None = None) -> plan.Plan:
    """Plan scores of a query and a key on these devices."""
    return plan.scores(spec(query, 3, 4), spec(key, 3, 4), "inverse", 1.0, 1e-3, backend, None)


@pytest.mark.parametrize("query, key", [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
def test_scores_device_mismatch(query, key):
    with pytest.raises(ValueError, match=rf"key must be on query's device \({query}\), got {key}"):
        plan_for(query, key)


@pytest.mark.parametrize("name", ["grad_scores", "scores"])
def test_scores_backward_device_mismatch(name):
    given = {"grad_scores": spec("cpu", 3, 3), "scores": None, name: spec("cuda:0", 3, 3)}
    with pytest.raises(ValueError, match=rf"{name} must be on query's device \(cpu\), got cuda:0"):
        plan.scores_backward(plan_for("cpu", "cpu"), given["grad_scores"], given["scores"])


@pytest.mark.parametrize("backend", ["cpu", "emulator"])
def test_scores_backend_for_another_device(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' takes arrays on the CPU, got query on cuda:0"):
        plan_for("cuda:0", "cuda:0", backend)


def test_scores_other_device():
    with pytest.raises(ValueError, match="query must be on the CPU or on a CUDA device, got device mps:0"):
        plan_for("mps:0", "mps:0")


def test_scores_error_is_raised_every_time():
    """Checked calls are remembered; errors are not swallowed by that."""
    for _ in range(2):
        with pytest.raises(ValueError, match="key must have head_dim 4"):
            l1.l1_scores(X, np.zeros((3, 5), np.float32))


def test_scores_wrong_call_writes_nothing():
    """A wrong gradient is noticed before a kernel runs: its memory is not read out of bounds."""
    small = np.lib.stride_tricks.as_strided(np.zeros((1, 1), np.float32), (1, 1))
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        l1.l1_scores_backward(small, X, X)


def test_score_names_agree():
    """The formula, its derivative and the kernels know the same scores, and which of them are curved."""
    assert list(reference.FUNCTIONS) == list(reference.DERIVATIVES) == SCORES
    x = torch.linspace(0.1, 3, 8, dtype=torch.float64, requires_grad=True)
    for score in SCORES:
        y = reference.FUNCTIONS[score](x, 0.5)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(reference.DERIVATIVES[score](y.detach()), slope)
        assert (score in CURVED) == bool((slope != slope[0]).any())


def test_describe_counts_strides_in_elements():
    spec = arrays.describe(np.zeros((4, 6), np.float16)[::-2, ::3])
    assert spec == plan.ArraySpec("numpy", (2, 2), (-12, 3), "float16", "cpu")


def test_dimension_of_2_31():
    """Kernels count lengths in 32 bits."""
    query = np.broadcast_to(np.float16(0), (2**31, 1))
    with pytest.raises(ValueError, match=r"query must have dimensions below 2\*\*31, got \(2147483648, 1\)"):
        l1.l1_scores(query, np.zeros((1, 1), np.float16))


def test_backward_of_a_vector_is_told_of_its_own_axes():
    array = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"grad_scores must have at least 2 dimensions \(\.\.\., query length, key le"):
        l1.l1_scores_backward(np.zeros(3), array, array)


@pytest.mark.parametrize("option, value", [("scale", -1.0), ("scale", math.nan), ("eps", 0.0), ("eps", math.inf)])
def test_options_in_a_compiled_graph(option, value):
    """The operator itself refuses them, in float64 too."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    call = torch.compile(lambda x: l1.l1_scores(x, x, **{option: value}), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"{option} must be a positive finite number, got {value}"):
        call(x)


def test_vector_in_a_compiled_graph():
    call = torch.compile(lambda x: l1.l1_scores(x, x), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"query must have at least 2 dimensions \(\.\.\., length, head_dim\), got \(3,\)"
    ):
        call(torch.zeros(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_batch_that_does_not_broadcast_in_a_compiled_graph(dynamic):
    """Sizes may be symbols there."""
    query, key = torch.zeros(2, 3, 5, 4), torch.zeros(2, 2, 7, 4)
    call = torch.compile(l1.l1_scores, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pytest.raises(Exception, match=r"key must have batch dimensions that broadcast with .* to match query \("):
        call(query, key)


def test_scale_of_bool_in_a_compiled_graph():
    call = torch.compile(lambda x: l1.l1_scores(x, x, scale=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="scale must be a positive finite number, got bool True"):
        call(torch.zeros(2, 3))
