"""Every kernel of ``kernels_cu``, for every dtype, run by the emulator and compared with the formula in float64.

The emulator checks each access to memory (see `l1attn_cupy.emulator.engine`), so a race, an access out of bounds or a
misaligned one fails a test even where the numbers come out right; and it runs threads in another order in each launch.
"""

from __future__ import annotations

import numpy as np
import pytest
import quantized_cases
import tangent_cases
import torch
from cases import BROADCAST, SCORES, TORCH_LAYOUTS, assert_identical, options
from kernel_cases import Kernel, Machine, assert_gradients, assert_scores, each, problem
from quantized_cases import distances, numbers

import l1attn_cupy as l1
import l1attn_cupy.autograd  # registers the operators
from l1attn_cupy import reference, testing


@pytest.fixture
def machine():
    """What runs the kernels; test_cuda.py has another."""
    return Machine("emulator", "cpu")


def shapes(kernel: Kernel, channels: int, batch: tuple[int, ...] = ()) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Odd shapes of query and key that come to this kernel."""
    return (*batch, kernel.length_q, channels), (*batch, 65, channels)


# ---- sizes --------------------------------------------------------------------------------------------------------


@each("scores_forward")
def test_scores_forward_odd_sizes(machine, kernel):
    """No size is a multiple of a block, or each is one, or there are no channels at all."""
    for which, (length_q, length_k, channels) in enumerate(kernel.lengths):
        call = options(SCORES[which % 4], channels)
        assert_scores(machine, kernel, problem((length_q, channels), (length_k, channels), kernel.dtype, **call))


@each("scores_backward")
def test_scores_backward_odd_sizes(machine, kernel):
    for which, (length_q, length_k, channels) in enumerate(kernel.lengths):
        call = options(SCORES[which % 4], channels)
        assert_gradients(machine, kernel, problem((length_q, channels), (length_k, channels), kernel.dtype, **call))


@each("scores_jvp")
def test_scores_jvp_error(machine, kernel):
    """Odd sizes, all scores, batch dimensions that broadcast, each array with strides of its own, rows with gaps."""
    shapes = [((lq, e), (lk, e)) for lq, lk, e in kernel.lengths[::3]] + BROADCAST[2:4]
    for which, (query, key) in enumerate(shapes):
        given, call = (
            tangent_cases.problem(query, key, kernel.dtype),
            tangent_cases.options_of(SCORES[which % 4], query[-1]),
        )
        layout = TORCH_LAYOUTS["last stride 2" if which == 0 else "sliced"]
        laid_out = machine.own(*(layout(x) if which == 0 or at == which % 4 else x for at, x in enumerate(given)))
        own = {"backend": machine.backend, "variant": kernel.variant.name, "saved": which % 2 == 0}
        result = tangent_cases.by_kernel(laid_out, **call, **own).cpu()
        tangent_cases.assert_tangents(result, given, **call)


@pytest.mark.parametrize("channels", [96, 128])
@each("scores_forward")
def test_scores_forward_widths_at_which_the_original_races(machine, kernel, channels):
    """The original library lacks a barrier between writing and reading a tile, which shows at widths 96 and 128."""
    expected = problem((kernel.length_q, channels), (129, channels), kernel.dtype)
    first = assert_scores(machine, kernel, expected)
    assert_identical(assert_scores(machine, kernel, expected), first)


@pytest.mark.parametrize("channels", [96, 128])
@each("scores_backward")
def test_scores_backward_widths_at_which_the_original_races(machine, kernel, channels):
    assert_gradients(machine, kernel, problem((kernel.length_q, channels), (129, channels), kernel.dtype))


# ---- scores, ties, NaN --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@each("scores_forward")
def test_scores_forward_ties(machine, kernel, score):
    """Identical rows give F(0): with the default eps the score is 1000, the steepest there is."""
    query_shape, key_shape = shapes(kernel, 31, (2,))
    call = {"scale": 0.3} if score == "laplacian" else {}
    expected = problem(query_shape, key_shape, kernel.dtype, ties=True, score=score, **call)
    assert (expected.query[:, 0] == expected.key[:, 0]).all()
    assert_scores(machine, kernel, expected)


@pytest.mark.parametrize("score", SCORES)
@each("scores_backward")
def test_scores_backward_ties(machine, kernel, score):
    """Between identical rows |h| is a million with the default eps, its sign 0: others must not lose digits to it."""
    query_shape, key_shape = shapes(kernel, 31, (2,))
    call = {"scale": 0.3} if score == "laplacian" else {}
    assert_gradients(machine, kernel, problem(query_shape, key_shape, kernel.dtype, ties=True, score=score, **call))


@each("scores_backward")
def test_scores_backward_tied_channel(machine, kernel):
    """A channel in which all rows tie has gradient exactly 0, beside others that have not."""
    query, key, grad = testing.inputs(*shapes(kernel, 65), kernel.dtype)
    query[:, 40], key[:, 40] = 0.25, 0.25
    for score in SCORES:
        dquery, dkey = machine.gradients(kernel, grad, query, key, score=score, scale=0.1)
        assert not dquery[:, 40].any(), score
        assert not dkey[:, 40].any(), score
        assert dquery[:, 39].all(), score
        assert dkey[:, 41].all(), score


@each("scores_backward")
def test_scores_backward_identical_rows(machine, kernel):
    """Where all of query and key are equal, all gradients are exactly 0."""
    row = testing.inputs((1, 65), (1, 65), kernel.dtype)[0]
    query, key = row.expand(kernel.length_q, 65), row.expand(65, 65)
    grad = torch.randn(kernel.length_q, 65, generator=torch.Generator().manual_seed(0)).to(row.dtype)
    for gradient in machine.gradients(kernel, grad, query, key):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@each("scores_backward")
def test_scores_backward_mostly_tied_channel(machine, kernel):
    """Rows that differ in one channel only, as little as the fast way takes: what cancels is in proportion to their h.

    The error in the other channels is small beside the sum of all |h| of a row. It is not small beside the gradient
    there, which comes from one distant key alone (the header of scores_backward_tiled.cu says so).
    """
    length, channels = kernel.length_q, 65
    query = torch.zeros(length, channels, dtype=torch.float64)
    key = torch.zeros(65, channels, dtype=torch.float64)
    key[:, 0], key[64] = 0.0625, 10.0  # x = 62 eps to all keys but the last
    query, key = query.to(testing.DTYPES[kernel.dtype]), key.to(testing.DTYPES[kernel.dtype])
    grad = testing.inputs(query.shape, key.shape, kernel.dtype)[2]
    exact = reference.l1_scores_backward(grad, query, key)
    h = grad.double() * reference.l1_scores(query, key) ** 2
    for gradient, expected, size in zip(
        machine.gradients(kernel, grad, query, key), exact, (h.abs().sum(1), h.abs().sum(0)), strict=True
    ):
        accumulated, stored = (
            (torch.float64, torch.float64) if kernel.dtype == "float64" else (torch.float32, query.dtype)
        )
        terms = 2 * max(query.shape[0], key.shape[0])
        rounding = 4 * torch.finfo(stored).eps  # of the saved scores, of grad * F', and of the result
        bound = size.unsqueeze(-1) * (terms * torch.finfo(accumulated).eps) + expected.abs() * rounding
        assert ((gradient.double() - expected).abs() <= bound).all()


def inputs_with_specials(shapes, dtype, where="all"):
    """Normally distributed inputs with ties, and NaN and infinities in query, key and the gradient."""
    query, key, grad = testing.inputs(*shapes, dtype, ties=True)
    if where in ("query", "all"):
        query[1, 3], query[2, 64], query[3, 0], query[4, 7] = np.inf, -np.inf, np.nan, np.inf
    if where in ("key", "all"):
        key[5, 3], key[6, 64], key[64, 33], key[30, 7] = np.inf, -np.inf, np.nan, -np.inf
    if where in ("grad", "all"):
        grad[7, 5], grad[8, 64], grad[32, 0] = np.inf, -np.inf, np.nan
    return query, key, grad


@pytest.mark.parametrize("score", SCORES)
@each("scores_forward")
def test_scores_forward_nan_and_infinity(machine, kernel, score):
    """They are where the formula has them: inf - inf is NaN, one inf is a distance of inf."""
    query, key, _ = inputs_with_specials(shapes(kernel, 65), kernel.dtype)
    expected = testing.Expected(query, key, score=score, scale=0.05)
    assert not reference.l1_scores(query, key, score=score).isfinite().all()
    assert_scores(machine, kernel, expected)


@pytest.mark.parametrize("where", ["query", "key", "grad", "all"])
@pytest.mark.parametrize("score", SCORES)
@each("scores_backward")
def test_scores_backward_nan_and_infinity(machine, kernel, score, where):
    """They are where autograd through the formula has them; inf * sign(0) is NaN there too."""
    query, key, grad = inputs_with_specials(shapes(kernel, 65), kernel.dtype, where)
    call = {"score": score, "scale": 0.05}  # no score that rounds to 0, and so no inf * 0 from rounding
    exact = reference.l1_scores_backward(grad, query, key, **call)
    for scores in (l1.l1_scores(query, key, **call), None):
        gradients = machine.gradients(kernel, grad, query, key, scores, **call)
        for result, expected in zip(gradients, exact, strict=True):
            testing.assert_same_special(result, expected.to(result.dtype))


# ---- memory layouts -----------------------------------------------------------------------------------------------


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers from the second element of a buffer: no row begins at a multiple of 128 bits."""
    before = torch.nan if tensor.is_floating_point() else 99
    return torch.cat([tensor.new_full((1,), before), tensor.flatten()])[1:].view(tensor.shape)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first batch entry for all of them, without a copy: stride 0."""
    return tensor[:1].expand(tensor.shape)


LAYOUTS = {**TORCH_LAYOUTS, "unaligned": unaligned, "expanded": expanded}


def on_aligned_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that begins at a multiple of 128 bits, as torch's allocator makes them."""
    copy = tensor.contiguous().clone()
    assert copy.data_ptr() % 16 == 0
    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
@each("scores_forward")
def test_scores_forward_layouts(machine, kernel, layout):
    """Whatever strides and alignment: the same bits as from contiguous arrays."""
    query, key, _ = machine.own(*testing.inputs(*shapes(kernel, 32, (2,)), kernel.dtype))
    changed = [LAYOUTS[layout](array) for array in (query, key)]
    copies = [on_aligned_memory(array) for array in changed]
    expected = machine.scores(kernel, *copies)
    for pair in (changed, (changed[0], copies[1]), (copies[0], changed[1])):
        assert_identical(machine.scores(kernel, *pair), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@each("scores_backward")
def test_scores_backward_layouts(machine, kernel, layout):
    """All four arrays that it reads: the same bits, or as good if the order of atomic additions is left open."""
    query, key, grad = machine.own(*testing.inputs(*shapes(kernel, 32, (2,)), kernel.dtype))
    change = LAYOUTS[layout]
    grad, query, key = (change(array) for array in (grad, query, key))
    arrays = (grad, query, key, change(l1.l1_scores(query, key)))
    gradients = machine.gradients(kernel, *arrays)
    testing.Expected(query.cpu(), key.cpu(), grad.cpu()).assert_gradients(*gradients)
    if kernel.deterministic:
        copies = [on_aligned_memory(array) for array in arrays]
        for result, expected in zip(gradients, machine.gradients(kernel, *copies), strict=True):
            assert_identical(result, expected)


@each("scores_forward")
def test_scores_forward_rows_of_odd_length(machine, kernel):
    """Each row is aligned otherwise than the one before it, in query, key and the result."""
    for channels, length_k in ((63, 33), (1, 65), (7, 63)):
        call = options("inverse", channels)
        assert_scores(machine, kernel, problem((kernel.length_q, channels), (length_k, channels), kernel.dtype, **call))


def lengthened(kernel, shapes):
    """Shapes with as many queries as come to this kernel."""
    return (*shapes[0][:-2], kernel.length_q, shapes[0][-1]), shapes[1]


@pytest.mark.parametrize("broadcast", BROADCAST, ids=str)
@each("scores_forward")
def test_scores_forward_broadcast(machine, kernel, broadcast):
    assert_scores(machine, kernel, problem(*lengthened(kernel, broadcast), kernel.dtype))


@pytest.mark.parametrize("broadcast", BROADCAST, ids=str)
@each("scores_backward")
def test_scores_backward_broadcast(machine, kernel, broadcast):
    """Gradients are summed over the batch dimensions in which an array was broadcast."""
    assert_gradients(machine, kernel, problem(*lengthened(kernel, broadcast), kernel.dtype, score="negative"))


@each("scores_forward")
def test_scores_forward_many_batch_dimensions(machine, kernel):
    """Strides that cannot be merged: each batch index is taken apart."""
    query = testing.inputs((2, 3, 2, kernel.length_q, 7), (2, 3, 2, 5, 7), kernel.dtype)[0].permute(2, 0, 1, 3, 4)
    key = testing.inputs((2, 3, 2, 5, 7), (2, 3, 2, 5, 7), kernel.dtype)[0].permute(2, 0, 1, 3, 4)
    assert_scores(machine, kernel, testing.Expected(query, key))


# ---- what is wanted, and how often --------------------------------------------------------------------------------


@each("scores_backward")
def test_scores_backward_one_gradient_only(machine, kernel):
    """What autograd does not ask for is not computed, and the other is not changed by that."""
    inputs = testing.inputs(*shapes(kernel, 33, (2,)), kernel.dtype)
    query, key, grad = machine.own(*inputs)
    call = ("negative", 0.5, 1e-3, machine.backend, kernel.variant.name)

    def gradients(need_query, need_key):
        both = torch.ops.l1attn.scores_backward(grad, query, key, None, need_query, need_key, *call)
        return [gradient.cpu() for gradient in both]

    both, (dquery, no_dkey), (no_dquery, dkey) = gradients(True, True), gradients(True, False), gradients(False, True)
    assert no_dquery.numel() == no_dkey.numel() == 0
    testing.Expected(*inputs, score="negative", scale=0.5).assert_gradients(dquery, dkey)
    if kernel.deterministic:
        assert_identical(dquery, both[0])
        assert_identical(dkey, both[1])


@each("scores_backward")
def test_scores_backward_one_array_for_both(machine, kernel):
    """Self-attention: query and key are the same tensor."""
    query, _, _ = testing.inputs(*shapes(kernel, 33, (2,)), kernel.dtype)
    grad = testing.inputs(query.shape, query.shape, kernel.dtype)[2]
    assert_gradients(machine, kernel, testing.Expected(query, query, grad, score="laplacian", scale=0.1))


@each("scores_forward")
def test_scores_forward_same_bits_in_every_order_of_threads(machine, kernel):
    query, key, _ = testing.inputs(*shapes(kernel, 65, (2,)), kernel.dtype)
    first = machine.scores(kernel, query, key)
    for _ in range(4):
        assert_identical(machine.scores(kernel, query, key), first)


@each("scores_backward", deterministic=True)
def test_scores_backward_same_bits_in_every_order_of_threads(machine, kernel):
    query, key, grad = testing.inputs(*shapes(kernel, 65, (2,)), kernel.dtype)
    first = machine.gradients(kernel, grad, query, key)
    for _ in range(4):
        for result, expected in zip(machine.gradients(kernel, grad, query, key), first, strict=True):
            assert_identical(result, expected)


@each("scores_forward")
def test_scores_forward_gradient_whatever_the_variant(kernel):
    """The backward takes the variant of the same name, or the default if there is none, as for "half2"."""
    query, key, grad = testing.inputs(*shapes(kernel, 33), kernel.dtype)
    query.requires_grad_()
    scores = l1.l1_scores(query, key, backend="emulator", variant=kernel.variant.name, score="negative")
    (dquery,) = torch.autograd.grad(scores, query, grad)
    expected = testing.Expected(query, key, grad, score="negative")
    expected.assert_gradients(dquery, l1.l1_scores_backward(grad, query.detach(), key, score="negative")[1])


@pytest.mark.parametrize("score", SCORES)
def test_scores_forward_half2_nearly_equal_rows(machine, score):
    """A large channel that all rows share cancels exactly, whatever its size."""
    (kernel,) = each("scores_forward").args[1][-1:]
    assert kernel.variant.name == "half2"
    generator = torch.Generator().manual_seed(0)
    base = 1e-2 * torch.randn(64, generator=generator)
    query, key = (base + 1e-5 * torch.randn(n, 64, generator=generator) for n in (33, 40))
    query[:, 0] = key[:, 0] = 60000
    query, key = query.half(), key.half()
    assert_scores(machine, kernel, testing.Expected(query, key, score=score))
    assert (machine.scores(kernel, query, key, score="distance") >= 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_forward_half2_overflow_of_a_difference(machine, sign):
    """Beyond 65504 it is infinite; that score is computed once more, and those around it keep their bits."""
    (kernel,) = each("scores_forward").args[1][-1:]
    query, key, _ = testing.inputs((33, 17), (40, 17), "float16")
    before = machine.scores(kernel, query, key, scale=1e-4)
    query[5, 3], key[9, 3] = 60000 * sign, -60000 * sign
    after = machine.scores(kernel, query, key, scale=1e-4)
    exact = reference.l1_scores(query, key, scale=1e-4)
    assert (after[5, 9].double() - exact[5, 9]).abs() < 2**-10 * exact[5, 9]
    others = torch.ones(33, 40, dtype=torch.bool)
    others[5], others[:, 9] = False, False
    assert_identical(after[others], before[others])


@each("scores_forward")
def test_scores_forward_largest_scale(machine, kernel):
    """Identical rows have distance 0 whatever it is multiplied by."""
    query = testing.inputs((kernel.length_q, 7), (1, 7), kernel.dtype)[0]
    scores = machine.scores(kernel, query, query[:5], score="laplacian", scale=2e38)
    assert (scores[:5].diagonal() == 1).all()


@each("scores_backward")
def test_scores_backward_sum_of_h_beyond_the_largest_float(machine, kernel):
    """Where the sum of h overflows and that of h * sign does not."""
    largest = {"float64": 1e308, "float16": 6e4}.get(kernel.dtype, 2e38)
    dtype = testing.DTYPES[kernel.dtype]
    query, key = torch.zeros(kernel.length_q, 1, dtype=dtype), torch.tensor([[1.0], [-1.0]], dtype=dtype)
    grad = torch.full((kernel.length_q, 2), largest, dtype=dtype)
    grad[1:] = 0
    dquery, _ = machine.gradients(kernel, grad, query, key, score="distance")
    assert dquery[0, 0] == 0


# ---- bytes --------------------------------------------------------------------------------------------------------


@each("scores_quantized")
def test_scores_quantized_exact_at_odd_sizes(machine, kernel):
    """Integers to the last bit, whatever is left over of rows, keys, channels and words."""
    for length_q, length_k, channels in kernel.lengths:
        query, key = numbers((length_q, channels), kernel.dtype), numbers((length_k, channels), kernel.dtype, seed=1)
        result = machine.scores(kernel, *map(torch.from_numpy, (query, key)), score="distance")
        assert_identical(result, distances(query, key).astype(np.float32))


@each("scores_quantized")
def test_scores_quantized_layouts_and_scales(machine, kernel):
    """Every score; query, key and scale broadcast, each its own way; rows apart, unaligned, or all the same."""
    query, key = (
        torch.from_numpy(numbers(shape, kernel.dtype, seed=len(shape)))
        for shape in ((3, 1, kernel.length_q, 48), (2, 65, 48))
    )
    scales = [torch.linspace(0.001, 0.01, 3).reshape(3, 1, 1, 1), torch.tensor([0.003, 0.0007]).reshape(2, 1, 1)]
    for which, layout in enumerate(layout for layout in LAYOUTS if layout != "negative bit"):
        query, key = LAYOUTS[layout](query), LAYOUTS[layout](key) if which % 2 else key
        call = {"score": SCORES[which % 4], "scale": 0.3, "eps": 0.02, "quant_scale": scales[which % 2]}
        given = {**call, "quant_scale": machine.own(call["quant_scale"])[0]}
        quantized_cases.assert_scores(machine.scores(kernel, query, key, **given), query, key, **call)
