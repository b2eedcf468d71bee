"""L1 attention in models of Hugging Face transformers, all tiny and with random weights."""

from __future__ import annotations

import copy
import itertools
import re
import sys
import types

import child
import pytest
import torch

from l1attn_cupy import reference, testing
from l1attn_cupy.integrations import transformers as integration

transformers = pytest.importorskip("transformers", reason="transformers is not installed: see the extra 'transformers'")

# Arguments go by the names that all supported releases know.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v:FutureWarning")

#: Beside the model's own sizes: odd, and weights large enough that attention is far from uniform.
SIZES = {"vocab_size": 61, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LAYERS = {"num_hidden_layers": 2, "hidden_size": 36, "intermediate_size": 37, "max_position_embeddings": 64}
LLAMA = {**SIZES, **LAYERS, "num_attention_heads": 6, "num_key_value_heads": 2}
NEOX = {**SIZES, **LAYERS, "num_attention_heads": 3, "rotary_pct": 0.5}
GPT2 = {**SIZES, "n_layer": 2, "n_embd": 33, "n_head": 3, "n_positions": 64}
BERT = {**SIZES, **LAYERS, "num_attention_heads": 3, "attention_probs_dropout_prob": 0.0}
WINDOW = 5

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=WINDOW),
    "bert": lambda: transformers.BertConfig(**BERT, hidden_dropout_prob=0.0),
}
DECODERS = [name for name in CONFIGS if name != "bert"]


def naive_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, score="inverse", is_causal=None, **_
):
    """The formula, in the dtype of the model; ``scale`` as transformers passes it."""
    alone = attention_mask is None and query.shape[2] > 1
    out, _ = reference.l1_attention(
        query,
        key,
        value,
        attention_mask,
        is_causal=alone and (module.is_causal if is_causal is None else is_causal),
        enable_gqa=query.shape[1] != key.shape[1],
        dtype=query.dtype,
        scale=scaling,
        score=score,
    )
    return out.transpose(1, 2), None


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Ours as "l1" and "l1_negative", the formula as "naive" and "naive_negative"."""
    masks = transformers.AttentionMaskInterface
    for score in ("inverse", "negative"):
        suffix = "" if score == "inverse" else "_negative"
        assert integration.register(score=score, name=f"l1{suffix}") == f"l1{suffix}"
        transformers.AttentionInterface.register(
            f"naive{suffix}", lambda *args, score=score, **kwargs: naive_attention(*args, score=score, **kwargs)
        )
        masks.register(f"naive{suffix}", masks()["sdpa"])


def make(name: str, implementation: str = "l1"):
    """A model in evaluation mode; the same weights for every implementation."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(CONFIGS[name](), attn_implementation=implementation).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Rows of different lengths as one batch, with its mask."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


class Judge:
    """The formula's logits in float64, and its error in float32, of which ours may be `testing.MULTIPLE` times."""

    def __init__(self, name: str, inputs: dict[str, torch.Tensor], suffix: str = ""):
        single, double = make(name, f"naive{suffix}"), make(name, f"naive{suffix}").double()
        self.valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
        with torch.no_grad():
            self.exact = double(**inputs).logits
            self.bound = testing.MULTIPLE * (single(**inputs).logits - self.exact)[self.valid].abs().max()
        assert 0 < self.bound < 1e-2 * self.exact.abs().max()

    def check(self, logits: torch.Tensor, places=...) -> None:
        """At ``places``; what a padded query gives has no meaning."""
        wrong = (logits - self.exact[places]).abs()
        wrong = wrong[self.valid] if places is ... else wrong
        assert wrong.max() <= self.bound, f"error {wrong.max():.2e}, bound {self.bound:.2e}"  # NaN fails


@pytest.mark.parametrize("suffix", ["", "_negative"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_naive_formula(name, suffix):
    """With padding, GQA (llama, mistral) and a window that cuts (mistral)."""
    inputs = padded([*tokens(1, 13), *tokens(1, 7, seed=1)], "right")
    judge = Judge(name, inputs, suffix)
    with torch.no_grad():
        judge.check(make(name, f"l1{suffix}")(**inputs).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_without_mask(name):
    """transformers makes no mask here: causality comes from the module, and BERT has none."""
    inputs = {"input_ids": tokens(2, WINDOW - 1 if name == "mistral" else 11)}
    judge = Judge(name, inputs)
    with torch.no_grad():
        judge.check(make(name)(**inputs).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decode_equals_prefill(name, kind):
    """Tokens one at a time, after a prefill and a second chunk, against the formula on all at once."""
    ids = tokens(2, 13)
    judge, model = Judge(name, {"input_ids": ids}), make(name)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=19)
    else:
        cache = transformers.DynamicCache(config=model.config)
    ends = [0, 4, 7, *range(8, 14)]
    with torch.no_grad():
        for start, end in itertools.pairwise(ends):
            logits = model(ids[:, start:end], past_key_values=cache, use_cache=True).logits
            judge.check(logits, (slice(None), slice(start, end)))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_left_padded_equals_unpadded(name, kind):
    """A prompt gives the same tokens whether or not it stands in a batch with a longer one."""
    model = make(name)
    prompts = [*tokens(1, 9), *tokens(1, 4, seed=1)]
    options = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": kind}
    with integration.count_calls(model) as calls:
        together = model.generate(**padded(prompts, "left"), **options)
    assert set(calls.values()) == {7} and len(calls) == 2
    for row, prompt in zip(together, prompts, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        alone = model.generate(prompt[None], attention_mask=mask, **options)[0, len(prompt) :]
        assert row[9:].tolist() == alone.tolist()
    if name == "llama":  # greedy tokens of a random model can be told apart
        assert len(set(together[:, 9:].flatten().tolist())) > 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(side):
    """What stands where the mask is 0 changes no bit of the rest."""
    model = make("bert")
    inputs = padded([*tokens(1, 11), *tokens(1, 6, seed=1)], side)
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)}
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[valid], model(**other).logits[valid])
        assert not torch.equal(model(**inputs).logits[~valid], model(**other).logits[~valid])


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_agree_with_naive_formula(name):
    inputs = padded([*tokens(1, 11), *tokens(1, 6, seed=1)], "right")
    exact = gradients(make(name, "naive").double().train(), inputs)
    single = gradients(make(name, "naive").train(), inputs)
    ours = gradients(make(name).train(), inputs)
    assert ours.keys() == exact.keys()
    sizes = {name: gradient.abs().max() for name, gradient in exact.items() if gradient.abs().max() > 1e-9}
    bound = testing.MULTIPLE * max((single[n] - exact[n]).abs().max() / size for n, size in sizes.items())
    assert bound < 1e-2
    for parameter, size in sizes.items():
        assert (ours[parameter] - exact[parameter]).abs().max() <= bound * size, parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_training_with_gradient_checkpointing(name):
    """The same gradients bit for bit, and ten steps that reduce the loss."""
    model = make(name).train()
    inputs = padded([*tokens(1, 11), *tokens(1, 6, seed=1)], "left" if name in DECODERS else "right")
    without = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    with integration.count_calls(model) as calls:
        checkpointed = gradients(model, inputs)
    assert set(calls.values()) == {2}  # forward, and again in the backward pass
    assert all(torch.equal(without[n], checkpointed[n]) for n in without)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiled_in_one_graph():
    model, inputs = make("llama"), {"input_ids": tokens(2, 9), "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        Judge("llama", inputs).check(compiled(**inputs).logits)


def test_autocast():
    """Rotary positions leave query and key in float32, beside a value in bfloat16."""
    inputs, logits = {"input_ids": tokens(2, 9)}, {}
    for implementation in ("l1", "naive"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = make("llama", implementation).train()(**inputs, labels=inputs["input_ids"])
        loss.loss.backward()
        logits[implementation] = loss.logits.detach()
    exact = Judge("llama", inputs).exact
    bound = testing.MULTIPLE * (logits["naive"] - exact).abs().max()
    assert (logits["l1"] - exact).abs().max() <= bound < 0.5 * exact.abs().max()


def test_encoder_decoder():
    """Cross-attention: queries of one length, keys of another with padding."""
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in
             {"layers": 1, "attention_heads": 3, "ffn_dim": 17}.items()}  # fmt: skip
    config = transformers.BartConfig(vocab_size=61, d_model=33, **sizes, max_position_embeddings=64)
    inputs = padded([*tokens(1, 9), *tokens(1, 4, seed=1)], "right") | {"decoder_input_ids": tokens(2, 5)}
    models = {}
    for implementation in ("l1", "naive"):
        torch.manual_seed(0)
        auto = transformers.AutoModelForSeq2SeqLM
        models[implementation] = auto.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    assert len(integration.check(models["l1"], **inputs)) == 3
    with torch.no_grad():
        ours, single = models["l1"](**inputs).logits, models["naive"](**inputs).logits
        exact = models["naive"].double()(**inputs).logits
    assert (ours - exact).abs().max() <= testing.MULTIPLE * (single - exact).abs().max() < 1e-2


def test_packed_sequences_by_position_ids():
    """Two sequences in one row attend each to itself alone."""
    model, rows = make("llama"), [*tokens(1, 5), *tokens(1, 8, seed=1)]
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        packed = model(torch.cat(rows)[None], position_ids=position_ids, use_cache=False).logits[0]
        for row, logits in zip(rows, packed.split([5, 8]), strict=True):
            Judge("llama", {"input_ids": row[None]}).check(logits[None])


def test_shared_heads_are_not_copied(monkeypatch):
    """Six heads of query come beside two of key and value, which the cache holds in its own memory."""
    seen = []

    def spy(query, key, value, *args, **options):
        seen.append((query.shape[1], key.shape[1], value.shape[1], key.data_ptr()))
        return real(query, key, value, *args, **options)

    real = integration.l1_attention
    monkeypatch.setattr(integration, "l1_attention", spy)
    model, cache = make("llama"), transformers.DynamicCache()
    with torch.no_grad():
        model(tokens(1, 7), past_key_values=cache)
    assert seen == [(6, 2, 2, layer.keys.data_ptr()) for layer in cache.layers]


def test_register_options_reach_the_attention():
    """And a second call with the same name replaces them."""
    model, ids = make("llama"), tokens(1, 9)
    try:
        with torch.no_grad():
            own = model(ids).logits
            integration.register(scale=6**-0.5)  # what the model passes
            assert torch.equal(model(ids).logits, own)
            for options in ({"scale": 0.3}, {"eps": 0.1}, {"score": "laplacian"}):
                integration.register(**options)
                assert not torch.allclose(model(ids).logits, own, rtol=1e-3), options
    finally:
        integration.register()


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"score": "cosine"}, "score must be one of .*, got 'cosine'"),
        (TypeError, {"score": None}, "score must be a string, got None"),
        (ValueError, {"scale": 0}, "scale must be a positive finite number, got 0"),
        (TypeError, {"eps": "small"}, "eps must be a positive finite number, got str 'small'"),
        (ValueError, {"name": "my/kernel"}, "name must be a string of letters, digits and underscores"),
        (ValueError, {"name": None}, "name must be a string of letters, digits and underscores, got None"),
        (ValueError, {"name": "l1_flash"}, "name must be without 'flash', which transformers goes by"),
        (ValueError, {"name": "naive"}, "name must be new to transformers, got 'naive'"),
    ],
)
def test_register_refuses(error, options, message):
    before = set(transformers.AttentionInterface())
    with pytest.raises(error, match=message):
        integration.register(**options)
    assert set(transformers.AttentionInterface()) == before


def test_dropout_of_weights_in_training():
    """GPT-2 has it by default. In evaluation there is none."""
    config = transformers.GPT2Config(**GPT2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="l1").train()
    with pytest.raises(NotImplementedError, match=r"got 0.1 from GPT2Attention: set it to 0 .*attn_pdrop"):
        model(tokens(1, 5))
    model.eval()(tokens(1, 5))


UNSUPPORTED = {
    "softcap": lambda: transformers.Gemma2Config(**LLAMA, head_dim=6, sliding_window=WINDOW),
    "s_aux": lambda: transformers.GptOssConfig(**LLAMA, head_dim=6, num_local_experts=2, num_experts_per_tok=1),
    "position_bias": lambda: transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=11, d_ff=17, num_layers=1, num_heads=3, decoder_start_token_id=0
    ),
}


@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_unsupported_models(argument):
    config = UNSUPPORTED[argument]()
    auto = transformers.AutoModelForSeq2SeqLM if argument == "position_bias" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="l1").eval()
    inputs = {"decoder_input_ids": tokens(1, 3)} if argument == "position_bias" else {}
    with pytest.raises(NotImplementedError, match=f"must not get '{argument}', got it from .*Attention: "):
        model(tokens(1, 5), **inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_attentions(name):
    """GPT-2 and others take it without telling the attention function."""
    with pytest.raises(NotImplementedError, match="must not get 'output_attentions'"):
        make(name)(tokens(1, 5), output_attentions=True)


@pytest.mark.parametrize("argument", ["cu_seq_lens_q", "head_mask", "something_new"])
def test_unknown_arguments(argument):
    with pytest.raises(NotImplementedError, match=f"must not get '{argument}', got it from LlamaAttention: "):
        make("llama")(tokens(1, 5), **{argument: torch.tensor([0, 5])})


def test_sliding_window_without_its_mask():
    """A module that is called by itself has no mask, and the window would be lost."""
    attention = make("mistral").model.layers[0].self_attn
    rotary = torch.ones(1, 9, 6), torch.zeros(1, 9, 6)
    with pytest.raises(ValueError, match="attention_mask must hold the sliding window of 5 for 9 keys, got None"):
        attention(torch.randn(1, 9, 36), position_embeddings=rotary, attention_mask=None)


def test_check_counts_calls():
    assert integration.check(make("llama"), tokens(1, 5)) == {f"model.layers.{i}.self_attn": 1 for i in (0, 1)}
    layers = {f"bert.encoder.layer.{i}.attention.self": 1 for i in (0, 1)}
    assert integration.check(make("bert"), input_ids=tokens(1, 5)) == layers


def test_check_fails_for_other_attention():
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa', in which 0 modules called it and 2 ran without"):
        integration.check(make("llama", "sdpa"), tokens(1, 5))


@pytest.mark.parametrize("name", ["Bloom", "XLNet"])
def test_check_fails_for_models_with_attention_of_their_own(name):
    """They take the name, and go on with the dot product."""
    sizes = {
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4},
    }
    config = getattr(transformers, f"{name}Config")(vocab_size=61, **sizes[name])
    model = transformers.AutoModel.from_config(config, attn_implementation="l1").eval()
    with pytest.raises(ValueError, match=rf"got {name}Model .*0 modules called it and 2 ran without: .*{name}"):
        integration.check(model, tokens(1, 5))


def test_check_fails_for_a_model_in_part_of_other_attention():
    """One of two layers, and a module of torch's beside ours."""
    model = make("llama")
    layer = model.model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"1 modules called it and 1 ran without: model.layers.1.self_attn"):
        integration.check(model, tokens(1, 5))


@pytest.mark.parametrize("in_place", [True, False])
def test_check_of_a_compiled_model(in_place):
    """Its graph calls no function of ours that could be counted."""
    model = make("llama")
    compiled = torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model must not be compiled, got .*: count calls before torch.compile"):
        integration.check(model if in_place else compiled, tokens(1, 5))


@pytest.mark.parametrize("wrong", [None, "m"], ids=repr)
def test_check_of_what_is_no_module(wrong):
    message = re.escape(f"model must be a torch.nn.Module, got {type(wrong).__name__} {wrong!r}")
    with pytest.raises(TypeError, match=message):
        integration.check(wrong, tokens(1, 5))
    with pytest.raises(TypeError, match=message), integration.count_calls(wrong):
        pass


def test_check_of_a_module_of_another_library():
    with pytest.raises(TypeError, match=r"model must be a transformers model, .* got Linear, without a config"):
        integration.check(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_check_of_a_module_that_holds_a_model():
    layers = {f"0.model.layers.{i}.self_attn": 1 for i in (0, 1)}
    assert integration.check(torch.nn.Sequential(make("llama")), tokens(1, 5)) == layers
    with pytest.raises(ValueError, match=r"got Sequential with attn_implementation=None, .* 2 ran without: 0.model"):
        integration.check(torch.nn.Sequential(make("llama", "sdpa")), tokens(1, 5))


def test_check_leaves_nothing_behind():
    model = make("llama")
    integration.check(model, tokens(1, 5))
    with pytest.raises(ZeroDivisionError), integration.count_calls(model):
        raise ZeroDivisionError
    assert not integration._observers
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_import_needs_neither_torch_nor_transformers():
    code = (
        "import sys, l1attn_cupy.integrations.transformers; "
        "print([name for name in ('torch', 'transformers', 'numba') if name in sys.modules])"
    )
    assert child.run(code).strip() == "[]"


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs torch and transformers .*pip install 'l1attn_cupy\[transformers\]'"):
        integration.register()


def test_register_with_old_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="5.2.0"))
    with pytest.raises(ImportError, match=r"needs transformers 5.12 or newer, got 5.2.0"):
        integration.register()
