"""`L1MultiheadAttention` beside `torch.nn.MultiheadAttention`, and the module of the original library."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import assert_identical
from torch.nn import functional

import l1attn_cupy as l1
from l1attn_cupy import plan_modules, reference
from l1attn_cupy.compat import L1Attn

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask", "ignore:.*torch.jit:DeprecationWarning"
)

EMBED, HEADS, BATCH, L, S = 20, 5, 3, 7, 9
INPUTS, MASKS = ("query", "key", "value"), ("attn_mask", "key_padding_mask")

CONFIGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "kdim, vdim": {"kdim": 11, "vdim": 13, "batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 11, "vdim": 13},
}


def dot_product_by_l1(monkeypatch):
    """Makes L1 attention a dot product: what is left is all that the module has in common with torch's."""

    def scores(query, key, score, scale, eps, backend, variant):
        return scale * query @ key.mT

    def attention(query, key, value, mask, *, is_causal, scale, **_):
        return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)

    monkeypatch.setattr("l1attn_cupy.autograd.l1_scores", scores)
    monkeypatch.setattr("l1attn_cupy.modules.l1_attention", attention)


def pair(**config):
    """Torch's module and ours with its weights, in float64."""
    torch.manual_seed(0)
    torchs = torch.nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **config)
    for parameter in torchs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = l1.L1MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **config)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def inputs(config, batched=True):
    generator = torch.Generator().manual_seed(1)
    widths = EMBED, config.get("kdim", EMBED), config.get("vdim", EMBED)
    found = []
    for length, width in zip((L, S, S), widths, strict=True):
        shape = (BATCH, length) if config.get("batch_first") else (length, BATCH)
        shape = (*shape, width) if batched else (length, width)
        found.append(torch.randn(shape, dtype=torch.float64, generator=generator))
    return found


def masks(kind, batched=True):
    """attn_mask and key_padding_mask; every query has a key."""
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros((BATCH, S) if batched else (S,), dtype=torch.bool)
    padding[..., S - 2 :] = True
    if batched:
        padding[1, 3:] = True
    place = torch.rand(L, S, generator=generator) > 0.7
    place[:, :2] = False
    each = torch.rand((BATCH if batched else 1) * HEADS, L, S, generator=generator) > 0.7
    each[..., :2] = False
    added = torch.randn(L, S, dtype=torch.float64, generator=generator)
    return {
        "none": (None, None),
        "padding": (None, padding),
        "2d": (place, None),
        "3d": (each, padding),
        "added": (added, None),
        "added, padding": (added, padding),
        "added padding": (None, torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)),
    }[kind]


@pytest.mark.parametrize(("batched", "need_weights"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("mask", ["none", "padding", "2d", "3d", "added", "added, padding", "added padding"])
@pytest.mark.parametrize("config", CONFIGS)
def test_multihead_is_torchs_but_for_the_score(config, mask, batched, need_weights, monkeypatch):
    """With the dot product in place of the distance, out, weights and gradients are those of torch's module."""
    config = CONFIGS[config]
    torchs, ours = pair(**config)
    dot_product_by_l1(monkeypatch)
    query, key, value = (x.requires_grad_() for x in inputs(config, batched))
    attn_mask, padding = masks(mask, batched)
    for average in (True, False) if need_weights else (True,):
        call = {"attn_mask": attn_mask, "key_padding_mask": padding, "average_attn_weights": average}
        results = [m(query, key, value, need_weights=need_weights, **call) for m in (torchs, ours)]
        torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(out.pow(2).sum(), (query, key, value)) for out, _ in results]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("more", [{}, {"add_zero_attn": True}], ids=str)
def test_multihead_is_causal(more, need_weights):
    """The same with the hint, with the mask, and with both."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True, **more)
    x = torch.randn(BATCH, L, EMBED)
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    calls = [{"is_causal": True}, {"attn_mask": later}, {"is_causal": True, "attn_mask": later}]
    first, *others = (module(x, x, x, need_weights=need_weights, **call) for call in calls)
    for other in others:
        torch.testing.assert_close(other, first)
    changed = x.clone()
    changed[:, -1] += 1
    out, _ = module(changed, changed, changed, need_weights=need_weights, is_causal=True)
    torch.testing.assert_close(out[:, :-1], first[0][:, :-1])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("more", [{}, {"add_bias_kv": True}], ids=str)
def test_multihead_is_causal_beside_another_mask(more, need_weights):
    """The mask is what counts, as where torch returns the weights: here keys in the past are cached."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True, **more)
    x, past = torch.randn(BATCH, L, EMBED), torch.randn(BATCH, S, EMBED)
    mask = torch.ones(L, S, dtype=torch.bool).triu(S - L + 1)
    first, hinted = (
        module(x, past, past, attn_mask=mask, need_weights=need_weights, is_causal=hint) for hint in (False, True)
    )
    torch.testing.assert_close(hinted, first)
    changed = past.clone()
    changed[:, -1] += 1
    out, _ = module(x, changed, changed, attn_mask=mask, need_weights=need_weights, is_causal=True)
    torch.testing.assert_close(out[:, :-1], first[0][:, :-1])
    assert not torch.isclose(out[:, -1], first[0][:, -1]).all()


@pytest.mark.parametrize("score", ["inverse", "negative"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_is_the_formula(score, need_weights):
    """The default scale is head_dim ** -0.5."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, score=score, eps=0.1)
    x = torch.randn(BATCH, L, EMBED, dtype=torch.float64)
    q, k, v = (x @ module.in_proj_weight.T).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
    out, _ = reference.l1_attention(q, k, v, score=score, scale=0.5, eps=0.1)
    expected = module.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, x, x, need_weights=need_weights)[0], expected)


def test_multihead_state_dict_both_ways():
    for config in CONFIGS.values():
        torchs, ours = pair(**config)
        torchs.load_state_dict(ours.state_dict())
        assert list(ours.state_dict()) == list(torchs.state_dict())
        assert copy.deepcopy(ours).state_dict().keys() == ours.state_dict().keys()
    assert ours.scale == 0.5


def test_multihead_starts_as_torchs():
    """The same random numbers give the same weights."""
    for config in CONFIGS.values():
        states = []
        for kind in (torch.nn.MultiheadAttention, l1.L1MultiheadAttention):
            torch.manual_seed(0)
            states.append(kind(EMBED, HEADS, **config).state_dict())
        for a, b in zip(*(state.values() for state in states), strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_dropout(need_weights):
    """In training weights drop out, scaled by what is left; in eval mode none does."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, L, EMBED)
    outs = [module(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.equal(*outs)
    weights = module(x, x, x, average_attn_weights=False)[1]
    module.eval()
    whole = module(x, x, x, average_attn_weights=False)[1]
    dropped = weights == 0
    assert 0.3 < dropped.float().mean() < 0.7  # of 735; three in a billion are outside
    torch.testing.assert_close(weights, (2 * whole).masked_fill(dropped, 0))
    assert_identical(*(module(x, x, x, need_weights=need_weights)[0] for _ in range(2)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_query_without_a_key(need_weights):
    """Nothing is attended to: the bias of the last projection, no NaN, also in the gradients, whatever keys hold."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True)
    torch.nn.init.normal_(module.out_proj.bias)
    x = torch.randn(BATCH, L, EMBED)
    x[1] = torch.nan
    key = x.clone().requires_grad_()
    query = torch.randn(BATCH, L, EMBED, requires_grad=True)
    padding = torch.zeros(BATCH, L, dtype=torch.bool)
    padding[1] = True
    out, _ = module(query, key, key, padding, need_weights=need_weights)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand_as(out[1]))
    out.sum().backward()
    assert query.grad.isfinite().all()
    assert (query.grad[1] == 0).all()


@pytest.fixture
def distance_calls(monkeypatch):
    """Calls of L1 attention."""
    calls = []
    real = l1.l1_attention

    def spy(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr("l1attn_cupy.modules.l1_attention", spy)
    return calls


def encoder_layer(**more):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(EMBED, 4, 32, batch_first=True, **more)
    layer.self_attn = l1.L1MultiheadAttention(EMBED, 4, batch_first=True)
    return layer


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_is_never_the_dot_product(norm_first, distance_calls):
    """In eval mode without gradients torch's layer would leave modules out, and compute dot products by itself."""
    layer, x = encoder_layer(norm_first=norm_first, dropout=0.0), torch.randn(BATCH, L, EMBED)
    padding = torch.zeros(BATCH, L, dtype=torch.bool)
    padding[1, 4:] = True
    for call in ({}, {"src_key_padding_mask": padding}, {"src_mask": torch.ones(L, L, dtype=torch.bool).triu(1)}):
        trained = layer.train()(x, **call)
        with torch.no_grad():
            assert_identical(layer.eval()(x, **call), trained.detach())
        with torch.inference_mode():
            assert_identical(layer(x, **call).clone(), trained.detach())
    assert len(distance_calls) == 9


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoder_is_never_the_dot_product(distance_calls):
    """A stack, with padding, for which torch would take nested tensors; and causal."""
    encoder = torch.nn.TransformerEncoder(encoder_layer(dropout=0.0), 2)
    x, padding = torch.randn(BATCH, L, EMBED), torch.zeros(BATCH, L, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L)
    for call in ({"src_key_padding_mask": padding}, {"mask": mask, "is_causal": True}):
        trained = encoder.train()(x, **call).detach()
        with torch.no_grad():
            found = encoder.eval()(x, **call)
        torch.testing.assert_close(found, trained)
    assert len(distance_calls) == 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_replaced_too_late():
    """An encoder that was built of dot products hands nested tensors on: an error that says what to do."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(EMBED, 4, 32, batch_first=True), 1)
    encoder.layers[0].self_attn = l1.L1MultiheadAttention(EMBED, 4, batch_first=True)
    padding = torch.zeros(BATCH, L, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(BATCH, L, EMBED)
    with torch.no_grad():
        assert encoder.eval()(x).shape == x.shape
        with pytest.raises(TypeError, match="give it enable_nested_tensor=False"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        assert encoder(x, src_key_padding_mask=padding).shape == x.shape


def test_decoder_layer(distance_calls):
    """Self-attention and attention to another sequence."""
    layer = torch.nn.TransformerDecoderLayer(EMBED, 4, 32, dropout=0.0, batch_first=True)
    for name in ("self_attn", "multihead_attn"):
        setattr(layer, name, l1.L1MultiheadAttention(EMBED, 4, batch_first=True))
    layer(torch.randn(BATCH, L, EMBED), torch.randn(BATCH, S, EMBED)).sum().backward()
    assert len(distance_calls) == 2
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_multihead_compiles():
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.randn(BATCH, L, EMBED)
    for need_weights in (False, True):
        compiled = torch.compile(
            lambda x, n=need_weights: module(x, x, x, need_weights=n), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), module(x, x, x, need_weights=need_weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 21}, "embed_dim must be a multiple of num_heads 5, got 21"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1 on, got 0"),
        ({"dropout": 1.5}, "dropout must be a number from 0 to 1, got 1.5"),
        ({"score": "dot"}, "score must be one of .*, got 'dot'"),
        ({"scale": -1.0}, "scale must be a positive finite number, got -1.0"),
        ({"eps": 0.0}, "eps must be a positive finite number, got 0.0"),
        ({"eps": 1e-50}, "eps must be from .* as float32 is used for float32, got 1e-50"),
        ({"kdim": -1}, "kdim must be a whole number from 1 on, got -1"),
    ],
)
def test_multihead_wrong_option(options, message):
    with pytest.raises(ValueError, match=message):
        l1.L1MultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": "20"}, "embed_dim must be a whole number from 1 on, got str '20'"),
        ({"num_heads": True}, "num_heads must be a whole number from 1 on, got bool True"),
        ({"kdim": "8"}, "kdim must be a whole number from 1 on, got str '8'"),
        ({"kdim": 8.0}, "kdim must be a whole number from 1 on, got float 8.0"),
        ({"vdim": 2.5}, "vdim must be a whole number from 1 on, got float 2.5"),
        ({"dropout": "0.1"}, "dropout must be a number from 0 to 1, got str '0.1'"),
        ({"dtype": torch.complex64}, "dtype must be torch.float16, .* or None, got torch.complex64"),
        ({"dtype": torch.int32}, "dtype must be torch.float16, .* or None, got torch.int32"),
        ({"dtype": "float32"}, "dtype must be torch.float16, .* or None, got 'float32'"),
        ({"bias": "no"}, "bias must be True or False, got 'no'"),
        ({"batch_first": "yes"}, "batch_first must be True or False, got 'yes'"),
        ({"add_zero_attn": "no"}, "add_zero_attn must be True or False, got 'no'"),
        ({"add_bias_kv": 2}, "add_bias_kv must be True or False, got 2"),
    ],
)
def test_multihead_wrong_option_type(options, message):
    with pytest.raises(TypeError, match=message):
        l1.L1MultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


@pytest.mark.parametrize("more", [{}, {"bias": False, "kdim": 11, "add_bias_kv": True, "dropout": 0.5}], ids=str)
def test_multihead_shows_what_makes_it_again(more):
    """What `print` shows are arguments."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True, eps=0.1, **more)
    again = eval(f"l1.L1MultiheadAttention({module.extra_repr()})")
    assert again.extra_repr() == module.extra_repr()
    assert {name: x.shape for name, x in again.state_dict().items()} == {
        name: x.shape for name, x in module.state_dict().items()
    }
    assert (again.dropout, again.batch_first, again.kdim, again.eps) == (
        more.get("dropout", 0.0),
        True,
        module.kdim,
        0.1,
    )


def test_multihead_takes_numbers_of_numpy():
    """As other numbers; what float64 can hold is accepted with it."""
    sizes = {"kdim": np.int64(11), "vdim": np.int32(13), "dropout": np.float32(0.5)}
    module = l1.L1MultiheadAttention(np.int64(EMBED), np.int64(HEADS), **sizes, dtype=torch.float64, eps=1e-50)
    kept = module.embed_dim, module.num_heads, module.kdim, module.vdim, module.dropout
    assert kept == (EMBED, HEADS, 11, 13, 0.5)
    assert {type(number) for number in kept} == {int, float}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"query": torch.zeros(BATCH, L, 19)}, r"query must have 20 channels, got \(3, 7, 19\)"),
        ({"query": torch.zeros(2, BATCH, L, EMBED)}, "query must have 3 dimensions, or 2 without a batch"),
        ({"key": torch.zeros(S, EMBED)}, "key must have 3 dimensions to match query"),
        ({"key": torch.zeros(2, S, EMBED), "value": torch.zeros(2, S, EMBED)}, "key must have a batch of 3"),
        ({"value": torch.zeros(BATCH, 8, EMBED)}, r"value must have the batch and length \(3, 9\) of key"),
        ({"attn_mask": torch.zeros(S, L)}, r"attn_mask must have the shape \(7, 9\) or \(15, 7, 9\), got \(9, 7\)"),
        ({"key_padding_mask": torch.zeros(S, BATCH)}, r"key_padding_mask must have the shape \(3, 9\), got \(9, 3\)"),
    ],
)
def test_multihead_wrong_shape(call, message):
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True)
    right = {"query": torch.zeros(BATCH, L, EMBED)} | dict.fromkeys(("key", "value"), torch.zeros(BATCH, S, EMBED))
    with pytest.raises(ValueError, match=message):
        module(**{**right, **call})


@pytest.mark.parametrize(
    ("batch_first", "batched", "axes"),
    [(True, True, "batch and length"), (False, True, "length and batch"), (False, False, "length")],
)
def test_multihead_wrong_value_names_its_axes(batch_first, batched, axes):
    """In the order in which they are."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    x, value = (torch.zeros(n, BATCH, EMBED)[:, slice(None) if batched else 0] for n in (L, S))
    with pytest.raises(ValueError, match=rf"value must have the {axes} \(7,.* of key, got \(9,"):
        module(x, x, value)


WRONG_TENSORS = {
    "None": (INPUTS, lambda x: None, "must be a torch tensor, got NoneType"),
    "str": (INPUTS, lambda x: "q", "must be a torch tensor, got str"),
    "numpy": (INPUTS, lambda x: x.numpy(), "must be a torch tensor, got numpy.ndarray"),
    "sparse": (INPUTS, lambda x: x.to_sparse(), "must be a dense array, got a sparse_coo one"),
    "float64": (INPUTS, lambda x: x.double(), r"must have the dtype of .* \(float32\), got float64"),
    "half": (INPUTS, lambda x: x.half(), r"must have the dtype of .* \(float32\), got float16"),
    "int": (INPUTS, lambda x: x.int(), "must have one of the dtypes float16, .*, got int32"),
    "bool": (INPUTS, lambda x: x.bool(), "must have one of the dtypes float16, .*, got bool"),
    "complex": (INPUTS, lambda x: x.cfloat(), "must have one of the dtypes float16, .* complex64"),
    "mask True": (MASKS, lambda x: True, "must be a torch tensor or None, got bool"),
    "mask str": (MASKS, lambda x: "causal", "must be a torch tensor or None, got str"),
    "mask list": (MASKS, lambda x: x.tolist(), "must be a torch tensor or None, got list"),
    "mask numpy": (MASKS, lambda x: x.numpy(), "must be a torch tensor or None, got numpy.ndarray"),
    "mask sparse": (MASKS, lambda x: x.to_sparse(), "must be a dense array, got a sparse_coo one"),
    "mask int": (MASKS, lambda x: x.long(), r"must be bool, True where attention is not allowed, or .* got int64"),
    "mask float64": (MASKS, lambda x: x.double(), r"must be bool, .* \(float32\), got float64"),
    "mask half": (MASKS, lambda x: x.half(), r"must be bool, .* \(float32\), got float16"),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_multihead_wrong_tensor(wrong):
    """Whichever argument it is; of masks, torch takes no other dtypes either."""
    names, make, message = WRONG_TENSORS[wrong]
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True)
    right = {"query": torch.zeros(BATCH, L, EMBED)} | dict.fromkeys(("key", "value"), torch.zeros(BATCH, S, EMBED))
    right |= {"attn_mask": torch.zeros(L, S), "key_padding_mask": torch.zeros(BATCH, S)}
    module(**right)
    for name in names:
        with pytest.raises(TypeError, match=f"^{name} {message}"):
            module(**{**right, name: make(right[name])})


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_multihead_mask_of_float32(dtype, need_weights):
    """As `generate_square_subsequent_mask` makes it, with weights of any dtype; what is finite rules nothing out."""
    module = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=dtype)
    x = torch.randn(BATCH, L, EMBED, dtype=dtype)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
    outs = [module(x, x, x, attn_mask=mask, need_weights=need_weights)[0] for mask in (causal, causal.isinf())]
    assert_identical(*outs)
    assert module(x, x, x, attn_mask=causal, need_weights=need_weights)[0].dtype is dtype
    low = {"attn_mask": torch.full((L, L), -1e9), "key_padding_mask": torch.full((BATCH, L), -1e9)}
    for masks_given in (low, {"attn_mask": low["attn_mask"]}):  # in float16 each would be -inf, and so would their sum
        out, _ = module(x, x, x, need_weights=need_weights, **masks_given)
        assert (out - module.out_proj.bias).abs().max() > 0.01


class SelfAttention(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True)
        self.options = options

    def forward(self, x):
        return self.attention(x, x, x, **self.options)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_traced(need_weights, tmp_path):
    """`torch.jit.trace` records operators, so that the graph can be saved, and trained."""
    module, x = SelfAttention(need_weights=need_weights, is_causal=True), torch.randn(BATCH, L, EMBED)
    torch.jit.trace(module, x).save(tmp_path / "module.pt")
    found = []
    for one in (module, torch.jit.load(tmp_path / "module.pt")):
        one(x).pow(2).sum().backward()
        found.append([one(x), *(parameter.grad for _, parameter in sorted(one.named_parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("module", [lambda: l1.L1MultiheadAttention(4, 2), L1Attn], ids=["multihead", "original"])
def test_module_not_scriptable(module):
    for made in (module(), torch.nn.Sequential(module())):
        with pytest.raises(
            NotImplementedError, match=r"cannot be compiled by torch.jit.script, .* use torch.jit.trace"
        ):
            torch.jit.script(made)


def test_multihead_wrong_device():
    """Of a tensor, or of the module."""
    module, x = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True), torch.zeros(BATCH, L, EMBED)
    with pytest.raises(ValueError, match="key must hold data, got a tensor on the meta device"):
        module(x, x.to("meta"), x)
    with pytest.raises(ValueError, match=r"query must be on the device of the module's weights \(meta\), got cpu"):
        module.to("meta")(x, x, x)


@pytest.mark.parametrize("name", ["need_weights", "average_attn_weights", "is_causal"])
@pytest.mark.parametrize("more", [{}, {"add_bias_kv": True}], ids=str)
def test_multihead_wrong_flag(more, name):
    module, x = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True, **more), torch.zeros(BATCH, L, EMBED)
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        module(x, x, x, **{name: "no"})


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_autocast_mixes(need_weights):
    """Under autocast other dtypes are taken, also of masks, as torch does; but for float64, which it leaves alone."""
    module, x = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True), torch.randn(BATCH, L, EMBED)
    mask = torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    with torch.autocast("cpu", torch.bfloat16):
        first, other = (module(x.bfloat16(), x, x, attn_mask=m, need_weights=need_weights)[0] for m in (mask, mask > 1))
        assert first.dtype is torch.bfloat16
        causal, _ = module(x.bfloat16(), x, x, need_weights=need_weights, is_causal=True)
        torch.testing.assert_close(first, causal)
        assert not torch.equal(first, other)
        with pytest.raises(TypeError, match=r"value must have the dtype of the module's weights \(float32\)"):
            module(x, x, x.double(), need_weights=need_weights)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_multihead_nested_mask():
    module, x = l1.L1MultiheadAttention(EMBED, HEADS, batch_first=True), torch.zeros(BATCH, L, EMBED)
    nested = torch.nested.nested_tensor([torch.zeros(n) for n in (L, 2, 3)])
    with pytest.raises(TypeError, match="key_padding_mask must be a dense array, got a nested one"):
        module(x, x, x, nested)


def test_multihead_nested():
    with pytest.raises(TypeError, match="query, key and value must be dense tensors, got a nested one"):
        plan_modules.multihead_nested()


@pytest.mark.parametrize("negative", [False, True])
def test_original_module(negative):
    """As the original computes it, with all differences at once."""
    q = torch.randn(2, 7, 3, 5, requires_grad=True)
    k = torch.randn(2, 9, 3, 5, requires_grad=True)
    distance = (q.transpose(1, 2).unsqueeze(3) - k.transpose(1, 2).unsqueeze(2)).abs().sum(-1) / math.sqrt(5)
    expected = (-distance).permute(0, 3, 2, 1) if negative else 1 / (0.001 + distance)
    scores = L1Attn(negative=negative)(q, k)
    torch.testing.assert_close(scores, expected)
    for result in zip(*(torch.autograd.grad(x.sum(), (q, k)) for x in (scores, expected)), strict=True):
        torch.testing.assert_close(*result)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 3, 4), r"q must have the shape \(batch, ctx, heads, width\), got \(2, 3, 4\)"),
        ("k", (2, 3, 4), r"k must have the shape \(batch, ctx, heads, width\), got \(2, 3, 4\)"),
        ("q", (2, 7, 3, 0), r"q must have a width from 1 on, .* got \(2, 7, 3, 0\)"),
        ("k", (2, 9, 3, 4), r"k must have width 5 to match q \(2, 7, 3, 5\), got \(2, 9, 3, 4\)"),
        ("k", (2, 9, 1, 5), r"k must have heads 3 to match q \(2, 7, 3, 5\), got \(2, 9, 1, 5\)"),
        ("k", (1, 9, 3, 5), r"k must have batch 2 to match q \(2, 7, 3, 5\), got \(1, 9, 3, 5\)"),
    ],
)
def test_original_module_wrong_shape(name, shape, message):
    """Shapes as the user gave them; nothing is broadcast, as in the original."""
    right = {"q": torch.zeros(2, 7, 3, 5), "k": torch.zeros(2, 9, 3, 5)}
    with pytest.raises(ValueError, match=message):
        L1Attn()(**{**right, name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: None, "must be a torch tensor, got NoneType"),
        (lambda x: x.numpy(), "must be a torch tensor, got numpy.ndarray"),
        (lambda x: x.to_sparse(), "must be a dense array, got a sparse_coo one"),
        (lambda x: x.cfloat(), "must have one of the dtypes float16, .* got complex64"),
    ],
)
def test_original_module_wrong_tensor(make, message, name):
    right = {"q": torch.zeros(2, 7, 3, 5), "k": torch.zeros(2, 9, 3, 5)}
    with pytest.raises(TypeError, match=f"^{name} {message}"):
        L1Attn()(**{**right, name: make(right[name])})


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_original_module_compiles():
    q, k, module = torch.randn(2, 7, 3, 5), torch.randn(2, 9, 3, 5), L1Attn()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), module(q, k))


def test_original_module_wrong_dtype_or_flag():
    """Dtypes are mixed only under autocast."""
    q, k = torch.zeros(2, 7, 3, 5), torch.zeros(2, 9, 3, 5, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"k must have the dtype of q \(float32\), got bfloat16"):
        L1Attn()(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert L1Attn()(q, k).dtype is torch.bfloat16
    with pytest.raises(TypeError, match="negative must be True or False, got 'no'"):
        L1Attn(negative="no")


def test_module_is_imported_lazily():
    """The package alone does not import torch, and says so where torch is missing."""
    code = (
        "import sys; sys.modules['torch'] = None; import l1attn_cupy\n"
        "assert 'L1MultiheadAttention' in dir(l1attn_cupy)\n"
        "try: l1attn_cupy.L1MultiheadAttention\n"
        "except ImportError as error: assert 'l1attn_cupy[torch]' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
        "assert not hasattr(l1attn_cupy, 'L1Nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
