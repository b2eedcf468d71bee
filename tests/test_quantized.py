"""8-bit query and key: `quantize_for_l1`, and the scores of what it makes, against integer sums and the formula."""

from __future__ import annotations

import ctypes
import re

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from cases import BROADCAST, LENGTHS, NUMPY_LAYOUTS, SCORES, TORCH_LAYOUTS, assert_identical
from llvmlite import ir
from quantized_cases import DTYPES, assert_scores, distances, numbers

import l1attn_cupy as l1
from l1attn_cupy import plan_quantized, testing
from l1attn_cupy.cpu import vector_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_quantized_exact_at_odd_sizes(lengths):
    """Distances are integers to the last bit, whatever is left over of rows, keys and channels."""
    length_q, length_k, channels = lengths
    dtype = DTYPES[LENGTHS.index(lengths) % 2]
    query, key = numbers((2, length_q, channels), dtype), numbers((2, length_k, channels), dtype, seed=1)
    result = l1.l1_scores(query, key, score="distance")
    assert_identical(result, distances(query, key).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_quantized_every_score(score, dtype):
    query, key = numbers((3, 33, 31), dtype), numbers((3, 65, 31), dtype, seed=1)
    query[:, 5] = key[:, 7]
    quant_scale = np.float32([0.01, 0.003, 0.0007]).reshape(3, 1, 1)
    options = {"score": score, "scale": 0.3, "eps": 0.02}
    assert_scores(l1.l1_scores(query, key, quant_scale=quant_scale, **options), query, key, quant_scale, **options)


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_quantized_broadcast(shapes):
    """Query, key and scale, each in its own way."""
    (query, key), batch = (numbers(shape, "int8") for shape in shapes), np.broadcast_shapes(*(s[:-2] for s in shapes))
    for own in {batch, batch[-1:], (1,) * len(batch)}:
        quant_scale = np.linspace(0.001, 0.01, int(np.prod(own)), dtype=np.float32).reshape(*own, 1, 1)
        result = l1.l1_scores(query, key, quant_scale=quant_scale)
        assert_identical(
            result, l1.l1_scores(*map(torch.from_numpy, (query, key)), quant_scale=torch.from_numpy(quant_scale))
        )
        assert_scores(result, query, key, quant_scale)


def test_quantized_sum_beyond_float32():
    """A sum above 2**24 is rounded once, to nearest."""
    channels = 70_001
    query = np.zeros((1, channels), np.uint8)
    key = np.full((2, channels), 255, np.uint8)
    key[1, 0] = 250
    expected = np.float32([[255 * channels, 255 * channels - 5]])
    assert expected.max() > 2**24
    assert_identical(l1.l1_scores(query, key, score="distance"), expected)


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
def test_quantized_numpy_layouts(layout):
    query, key = numbers((3, 33, 17), "int8"), numbers((3, 31, 17), "int8", seed=1)
    change = NUMPY_LAYOUTS[layout]
    assert_identical(l1.l1_scores(change(query), change(key)), l1.l1_scores(query, key))


@pytest.mark.parametrize("layout", [layout for layout in TORCH_LAYOUTS if layout != "negative bit"])
def test_quantized_torch_layouts(layout):
    query, key = (torch.from_numpy(numbers((3, n, 17), "uint8", seed=n)) for n in (33, 31))
    change = TORCH_LAYOUTS[layout]
    assert_identical(l1.l1_scores(change(query), change(key)), l1.l1_scores(query, key))


@pytest.mark.parametrize("shapes", [((2, 257, 64), (2, 129, 64)), ((3, 1500), (1100, 1500))], ids=str)
def test_quantized_on_any_number_of_threads(shapes):
    """Tasks that share the keys, and as many keys as do not fit the scratch memory at once."""
    query, key = (numbers(shape, "int8", seed=n) for n, shape in enumerate(shapes))
    q, k = torch.from_numpy(query), torch.from_numpy(key)
    with testing.one_thread():
        alone = l1.l1_scores(q, k, score="distance")
    assert_identical(l1.l1_scores(q, k, score="distance"), alone)
    assert_identical(alone, distances(query, key).astype(np.float32))


@pytest.mark.parametrize("shapes", [((2, 0, 3), (2, 5, 3)), ((2, 5, 3), (2, 0, 3)), ((0, 5, 3), (0, 4, 3))], ids=str)
def test_quantized_empty(shapes):
    query, key, quant_scale = l1.quantize_for_l1(*(np.ones(shape, np.float32) for shape in shapes))
    assert l1.l1_scores(query, key, quant_scale=quant_scale).shape == (shapes[0][0], shapes[0][1], shapes[1][1])


def test_quantized_without_channels():
    query, key, quant_scale = l1.quantize_for_l1(np.ones((2, 3, 0)), np.ones((2, 5, 0)))
    assert_identical(
        l1.l1_scores(query, key, quant_scale=quant_scale, score="laplacian"), np.ones((2, 3, 5), np.float32)
    )


# ---- quantize_for_l1 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["float16", "bfloat16", "float32", "float64"])
def test_quantize_is_within_half_a_step(of, dtype):
    """Each number to half a step, but for the rounding of the division; the widest channel uses all steps."""
    query, key, _ = testing.inputs((2, 3, 33, 17), (2, 3, 65, 17), of)
    query, key = query * torch.arange(1, 18), key + torch.arange(17)  # of different widths and places
    q8, k8, quant_scale = l1.quantize_for_l1(query, key, dtype=dtype)
    assert q8.dtype is k8.dtype is getattr(torch, dtype)
    assert q8.shape == query.shape
    assert k8.shape == key.shape
    assert quant_scale.shape == (2, 3, 1, 1)
    assert quant_scale.dtype is torch.float32
    both, both8 = torch.cat([query, key], -2).double(), torch.cat([q8, k8], -2).double()
    least = torch.iinfo(q8.dtype).min
    off = both - both.amin(-2, keepdim=True) - quant_scale.double() * (both8 - least)
    assert (off.abs() <= quant_scale.double() * (0.5 + 255 * 2.0**-22)).all()
    assert ((both8 - least).amax((-2, -1)) == 255).all()
    assert ((both8 - least).amin((-2, -1)) == 0).all()


def test_quantize_does_not_see_what_both_are_moved_by():
    """A shift of any channel changes nothing: integers here, so that it is exact."""
    query, key, shift = (torch.randint(0, 100, shape).double() for shape in ((33, 17), (65, 17), (1, 17)))
    for result, expected in zip(
        l1.quantize_for_l1(query + 1e6 * shift, key + 1e6 * shift), l1.quantize_for_l1(query, key), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_quantize_shares_a_scale_where_matrices_meet(shapes):
    query, key = (np.random.default_rng(len(s)).standard_normal(s).astype(np.float32) for s in shapes)
    q8, k8, quant_scale = l1.quantize_for_l1(query, key)
    assert q8.shape == query.shape
    assert k8.shape == key.shape
    result = l1.l1_scores(q8, k8, quant_scale=quant_scale, score="distance")
    exact = l1.l1_scores(query.astype(np.float64), key.astype(np.float64), score="distance")
    assert (np.abs(result - exact) <= (17 + 1e-3) * quant_scale).all()


def test_quantize_shared_heads():
    """Heads of query that share a key share a scale, and no others."""
    query, key = torch.randn(2, 6, 33, 17), torch.randn(2, 3, 31, 17) * torch.tensor([1.0, 2, 3]).reshape(3, 1, 1)
    q8, k8, quant_scale = l1.quantize_for_l1(query, key, enable_gqa=True)
    assert quant_scale.shape == (2, 3, 1, 1)
    for head in range(3):
        rows = query[:, 2 * head : 2 * head + 2].flatten(1, 2)
        expected = l1.quantize_for_l1(rows, key[:, head])
        assert torch.equal(q8[:, 2 * head : 2 * head + 2].flatten(1, 2), expected[0])
        assert torch.equal(k8[:, head], expected[1])
        assert torch.equal(quant_scale[:, head], expected[2])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_quantize_nan_and_infinity(special, library):
    """All scores of the matrix are NaN, as bytes cannot tell which is; no other matrix notices."""
    query, key = (np.random.default_rng(n).standard_normal((3, n, 4)).astype(np.float32) for n in (5, 7))
    key[1, 2, 3] = special
    query[1, 0, 3] = -3e38
    given = (query, key) if library == "numpy" else (torch.from_numpy(query), torch.from_numpy(key))
    q8, k8, quant_scale = l1.quantize_for_l1(*given)
    for score in SCORES:
        result = np.isnan(np.asarray(l1.l1_scores(q8, k8, quant_scale=quant_scale, score=score)))
        assert result[1].all()
        assert not result[[0, 2]].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_quantize_wider_than_float32(library):
    """The scale is a float32 number; one that would be infinite is NaN."""
    query = np.array([[1e300, -1e300]])
    query = query if library == "numpy" else torch.from_numpy(query)
    assert np.isnan(np.asarray(l1.quantize_for_l1(query, -query)[2])).all()


@pytest.mark.parametrize("of", ["float32", "float64"])
def test_quantize_of_no_width(of):
    """Equal numbers, and numbers that differ by less than a float32 can say, are a distance of 0."""
    query, key = np.full((2, 3), 7, of), np.full((5, 3), 7, of)
    query[1] += 0 if of == "float32" else 1e-42
    q8, k8, quant_scale = l1.quantize_for_l1(query, key)
    assert quant_scale.item() == np.finfo(np.float32).tiny
    assert_identical(l1.l1_scores(q8, k8, quant_scale=quant_scale, eps=0.02), np.full((2, 5), 50, np.float32))


# ---- errors -------------------------------------------------------------------------------------------------------

B, X, S = np.zeros((2, 3, 4), np.int8), np.zeros((2, 3, 4), np.float32), np.ones((2, 1, 1), np.float32)

WRONG = {
    "float key": ((B, X), {}, TypeError, "key must be int8 or uint8, .* got float32"),
    "float query": ((X, B), {}, TypeError, "query must be int8 or uint8, .* got float32"),
    "scale of floats": ((X, X), {"quant_scale": S}, TypeError, "query must be int8 or uint8, .* got float32"),
    "signs": ((B, B.astype(np.uint8)), {}, TypeError, r"key must have query's dtype \(int8\), got uint8"),
    "head_dim": ((B, B[..., :3]), {}, ValueError, "key must have head_dim 4 to match query"),
    "1-d": ((B[0, 0], B), {}, ValueError, r"query must have at least 2 dimensions .*, got \(4,\)"),
    "batch": ((B, B[[0, 0, 0]]), {}, ValueError, "key must have batch dimensions that broadcast"),
    "masked": ((np.ma.masked_array(B), B), {}, TypeError, "query must be a dense array, got a masked one"),
    "channels": (
        (np.broadcast_to(B[0, :1, :1], (1, 2**23 + 1)), np.broadcast_to(B[0, :1, :1], (1, 2**23 + 1))),
        {},
        ValueError,
        r"query must have a head_dim of at most 8388608 in int8, got \(1, 8388609\)",
    ),
    "number": ((B, B), {"quant_scale": 0.1}, TypeError, "quant_scale must be a NumPy .* array .* got float"),
    "scale's dtype": (
        (B, B),
        {"quant_scale": S.astype(np.float64)},
        TypeError,
        "quant_scale must have dtype float32, got float64",
    ),
    "scale's shape": (
        (B, B),
        {"quant_scale": S[:, 0]},
        ValueError,
        r"quant_scale must broadcast to the shape \(2, 1, 1\), with 1, 1 at its end, got \(2, 1\)",
    ),
    "scale without dimensions": (
        (B, B),
        {"quant_scale": np.ones((), np.float32)},
        ValueError,
        r"quant_scale must broadcast to the shape \(2, 1, 1\), .* got \(\)",
    ),
    "scale of one dimension": ((B, B), {"quant_scale": S[0, 0]}, ValueError, r"shape \(2, 1, 1\), .* got \(1,\)"),
    "scale's batch": ((B[0], B[0]), {"quant_scale": S}, ValueError, r"shape \(1, 1\), .* got \(2, 1, 1\)"),
    "scale of rows": ((B, B), {"quant_scale": X[:, :, :1]}, ValueError, r"shape \(2, 1, 1\), .* got \(2, 3, 1\)"),
    "scale's library": (
        (B, B),
        {"quant_scale": torch.ones(2, 1, 1)},
        TypeError,
        r"quant_scale must come from the same library as query \(numpy\), got torch",
    ),
    "score": ((B, B), {"score": "cosine"}, ValueError, "score must be one of 'inverse'"),
    "variant": ((B, B), {"variant": "sad"}, ValueError, "variant must be None on the cpu backend"),
    "eps": ((B, B), {"eps": 1e-60}, ValueError, "eps must be from .* as float32 is used for int8"),
}


NO_TENSORS = ("masked", "scale's library")


@pytest.mark.parametrize(
    "case, library", [(c, lib) for c in WRONG for lib in ("numpy", "torch") if lib == "numpy" or c not in NO_TENSORS]
)
def test_quantized_scores_error(case, library):
    """The same with tensors, where there are such."""
    arguments, options, error, message = WRONG[case]
    if library == "torch":
        arguments = [
            torch.from_numpy(x.copy()) if x.size < 100 else torch.from_numpy(x[:, :1].copy()).expand(x.shape)
            for x in arguments
        ]
        options = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(error, match=message):
        l1.l1_scores(*arguments, **options)


WRONG_NUMBERS = {
    "bytes": ((B, B), {}, TypeError, "query must have one of the dtypes float16, .* got int8"),
    "list": (([[0.0]], X), {}, TypeError, "query must be a NumPy .* array that speaks DLPack, got list"),
    "dtype": ((X, X), {"dtype": "int4"}, ValueError, "dtype must be one of 'int8', 'uint8', got 'int4'"),
    "type of dtype": ((X, X), {"dtype": np.int8}, TypeError, "dtype must be a string, got <class 'numpy.int8'>"),
    "flag": ((X, X), {"enable_gqa": 1}, TypeError, "enable_gqa must be True or False, got 1"),
    "head_dim": ((X, X[..., :3]), {}, ValueError, "key must have head_dim 4 to match query"),
    "batch": ((X, X[[0, 0, 0]]), {}, ValueError, "key must have batch dimensions that broadcast"),
    "heads": ((X, X[[0, 0, 0]]), {"enable_gqa": True}, ValueError, "query must have a multiple of the 3 heads of key"),
    "no heads": ((X[0], X[0]), {"enable_gqa": True}, ValueError, "query must have at least 3 dimensions"),
    "library": ((X, torch.zeros(2, 3, 4)), {}, TypeError, "key must come from the same library as query"),
    "gradient": (
        (torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)),
        {},
        TypeError,
        r"key must not require a gradient, .* torch.no_grad\(\) or key.detach\(\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_quantize_error(case):
    arguments, options, error, message = WRONG_NUMBERS[case]
    with pytest.raises(error, match=message):
        l1.quantize_for_l1(*arguments, **options)


TRACED = {
    "dtype": lambda q, k: l1.quantize_for_l1(q, k, dtype="int16"),
    "dtypes that differ": lambda q, k: l1.quantize_for_l1(q, k.double()),
    "integers": lambda q, k: l1.quantize_for_l1(q.int(), k.int()),
    "one dimension": lambda q, k: l1.quantize_for_l1(q[0], k[0]),
    "head_dim": lambda q, k: l1.quantize_for_l1(q, k[..., :1]),
}


@pytest.mark.parametrize("case", TRACED)
def test_quantize_error_in_compiled_code(case):
    """Where torch traces the call it is an error too."""
    torch.compiler.reset()
    compiled = torch.compile(TRACED[case], backend="aot_eager", fullgraph=True)
    with pytest.raises((TypeError, ValueError, torch._dynamo.exc.Unsupported), match=r"must|Observed exception"):
        compiled(torch.ones(3, 4), torch.ones(5, 4))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_quantize_matrix():
    """A matrix is a NumPy array with functions of its own; what comes is an array."""
    q8, k8, _ = l1.quantize_for_l1(X[0], np.matrix(X[0]))
    assert type(k8) is np.ndarray
    assert (q8 == k8).all()


def test_quantize_within_vmap_is_not_differentiated():
    """Nor where `vmap` hides who differentiates."""
    x = torch.randn(2, 3, 4)

    def scales(x):
        return torch.func.vmap(lambda a: l1.quantize_for_l1(a, a)[2].sum())(x).sum()

    with pytest.raises(TypeError, match="query must not require a gradient"):
        torch.func.grad(scales)(x)
    with pytest.raises(TypeError, match="query must not require a gradient"):
        torch.func.jvp(scales, (x,), (x,))


def test_quantized_has_no_gradient():
    """What could be differentiated by is an error, not a gradient of 0."""
    query, key = (torch.from_numpy(x) for x in (B, B))
    quant_scale = torch.ones(2, 1, 1, requires_grad=True)
    with pytest.raises(TypeError, match="quant_scale must not require a gradient"):
        l1.l1_scores(query, key, quant_scale=quant_scale)
    with torch.no_grad():
        l1.l1_scores(query, key, quant_scale=quant_scale)
    tangent = torch.ones(2, 1, 1)
    with pytest.raises(TypeError, match="quant_scale must not require a gradient"):
        torch.func.jvp(lambda s: l1.l1_scores(query, key, quant_scale=s), (tangent,), (tangent,))
    with pytest.raises(TypeError, match="query must not require a gradient"):
        torch.func.jvp(lambda q: l1.quantize_for_l1(q, q)[2], (tangent,), (tangent,))
    with pytest.raises(TypeError, match=r"query must have one of the dtypes float16, .* got int8"):
        l1.l1_scores_backward(torch.zeros(2, 3, 3), query, key)


# ---- torch --------------------------------------------------------------------------------------------------------


def test_quantized_operator():
    """It traces without data, and maps."""
    query, key = (torch.from_numpy(numbers((2, n, 17), "int8", seed=n)) for n in (5, 7))
    quant_scale = torch.tensor([0.1, 0.3]).reshape(2, 1, 1)
    options = ("inverse", 1.0, 1e-3, None, None)
    torch.library.opcheck(torch.ops.l1attn.scores_quantized, (query, key, quant_scale, *options))

    def call(query, key, quant_scale):
        return l1.l1_scores(query, key, quant_scale=quant_scale)

    expected = call(query, key, quant_scale)
    assert_identical(torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, quant_scale), expected)
    assert_identical(torch.vmap(call)(query, key, quant_scale), expected)
    assert_identical(
        torch.vmap(call, in_dims=(0, None, 0))(query, key[0], quant_scale)[1], call(query[1], key[0], quant_scale[1])
    )


def test_quantize_compiles_and_maps():
    query, key = torch.randn(2, 5, 17), torch.randn(2, 7, 17)
    compiled = torch.compile(l1.quantize_for_l1, fullgraph=True, backend="aot_eager")
    for call in (compiled, torch.vmap(l1.quantize_for_l1)):
        for result, expected in zip(call(query, key), l1.quantize_for_l1(query, key), strict=True):
            assert torch.equal(result, expected)


# ---- instructions -------------------------------------------------------------------------------------------------


def compiled(triple, features, lanes):
    """``sums[lanes] of |a - b|`` as a function of three addresses, for a machine: LLVM's module."""
    module = ir.Module("bytes")
    module.triple = triple
    integer, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), lanes)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [vector.as_pointer()] * 3), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    out, a, b = function.args
    loaded = [builder.load(x, align=1) for x in (a, b)]
    builder.store(vector_bytes.sums_of_words(builder, features, *loaded), out, align=1)
    builder.ret_void()
    assert integer.width == 64
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return parsed


@pytest.mark.parametrize("instructions", ["psadbw", "none"])
def test_byte_sums_with_any_instructions(instructions):
    """Also where there is no instruction for it, and where registers are narrower than panels."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    native = llvm.get_process_triple()
    if instructions == "psadbw" and "x86_64" not in native:
        pytest.skip("psadbw is an instruction of x86")
    parsed = compiled(native if instructions == "psadbw" else "", "", 8)
    machine = llvm.Target.from_triple(native).create_target_machine()
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    a, b = numbers((8, 8), "uint8"), numbers((8, 8), "uint8", seed=1)
    out = np.zeros(8, np.uint64)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(engine.get_function_address("f"))
    function(*(x.ctypes.data for x in (out, a, b)))
    assert (out == distances(a[:, None], b[:, None])[:, 0, 0]).all()


@pytest.mark.parametrize(
    "triple, cpu, features, expected",
    [
        ("x86_64-unknown-linux-gnu", "skylake-avx512", "+avx2,+avx512f,+avx512bw", r"psadbw\s[^\n]*zmm"),
        ("x86_64-unknown-linux-gnu", "haswell", "+avx2", r"psadbw\s[^\n]*ymm"),
        ("x86_64-unknown-linux-gnu", "x86-64", "", r"psadbw\s[^\n]*xmm"),
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "", "uabd.*uaddlp"),
    ],
)
def test_byte_sums_machine_code(triple, cpu, features, expected):
    """Each machine gets its own instruction and register width."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    lanes = {"zmm": 8, "ymm": 4}.get(expected[-3:], 2)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    text = machine.emit_assembly(compiled(triple, features, lanes))
    assert re.search(expected, text, re.DOTALL), text


def test_quantized_is_decided_by_either_array():
    """Wherever 8-bit arrays come in, the one module tells what is wrong with the rest."""
    assert plan_quantized.is_quantized(B, X, None)
    assert plan_quantized.is_quantized(X, torch.from_numpy(B), None)
    assert plan_quantized.is_quantized(X, X, S)
    assert not plan_quantized.is_quantized(X, [[0.0]], None)
