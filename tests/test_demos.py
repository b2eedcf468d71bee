"""The demonstrations: their data, their models, training in several processes, and the scripts with tiny settings."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter

import pytest
import torch
from child import ROOT

sys.path.append(str(ROOT / "scripts"))
import train_symmetric
import train_text
from demolib import options, runs, symmetric, text
from demolib.model import ATTENTIONS, Size, count_parameters
from demolib.report import mean_and_range
from rich.console import Console

TINY = Size(layers=1, embed_dim=8, num_heads=2, layer_norm=True)


# --- the symmetric problem


@pytest.fixture(scope="module")
def batch():
    """1,001 problems: tokens and answers."""
    return symmetric.make_batch(1001, torch.Generator().manual_seed(3))


def twins(tokens):
    """The pairs of tokens in each problem that share all their symbols."""
    symbols = tokens[..., : symmetric.SYMBOLS]
    same = (symbols[:, :, None] == symbols[:, None]).all(-1).triu(diagonal=1)
    return [problem.nonzero().tolist() for problem in same]


def test_symmetric_two_tokens_share_symbols(batch):
    """Exactly two, at any places, and no other symbol occurs twice."""
    pairs = twins(batch[0])
    assert all(len(found) == 1 for found in pairs)
    assert {tuple(found[0]) for found in pairs} == {(i, j) for i in range(16) for j in range(i + 1, 16)}
    for problem in batch[0][:50, :, : symmetric.SYMBOLS]:
        assert len(problem.flatten().unique()) == 15 * symmetric.SYMBOLS


def test_symmetric_answer_is_distance_of_twins(batch):
    """At the first scale, from 0 to 127/16; most differ."""
    tokens, answer = batch
    position = tokens[..., symmetric.SYMBOLS]
    for number, [(first, second)] in enumerate(twins(tokens)):
        assert answer[number] == abs(position[number, first] - position[number, second])
    assert len(answer.unique()) > 64


def test_symmetric_positions_are_given_at_four_scales(batch):
    position = batch[0][..., symmetric.SYMBOLS :]
    assert position.shape == (1001, 16, 4)
    steps = position[..., 0] * 16
    assert set(steps.unique().tolist()) == set(range(128))
    for scale in range(4):
        assert torch.equal(position[..., scale], steps / 16 / 4**scale)


def test_symmetric_symbols_are_normal_halves(batch):
    """Within 6 standard errors of mean 0 and standard deviation 1/2; two of 16 tokens count once."""
    symbols = batch[0][..., : symmetric.SYMBOLS].double()
    samples = 1001 * 15 * symmetric.SYMBOLS
    assert abs(symbols.mean()) < 6 * 0.5 / samples**0.5 * 2**0.5
    assert abs(symbols.std() - 0.5) < 6 * 0.5 / samples**0.5


def test_symmetric_batches_follow_the_generator():
    """The same seed makes the same batches, one after another all different."""
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    first = symmetric.make_batch(5, one)
    assert all(map(torch.equal, first, symmetric.make_batch(5, other)))
    assert not torch.equal(first[0], symmetric.make_batch(5, one)[0])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_symmetric_tokens_do_not_attend_to_themselves(attention):
    """The mask is the diagonal: without MLP and residual, a token has no influence on its own output."""
    torch.manual_seed(0)
    model = symmetric.Measurer(TINY, attention)
    block = model.blocks.blocks[0]
    hidden = torch.randn(1, 16, 8)
    changed = hidden.clone()
    changed[:, 5] += 1.0
    qkv = [torch.randn(1, 2, 16, 4) for _ in range(2)]
    values = [
        block.attend(*qkv, h.unflatten(-1, (2, 4)).transpose(1, 2), model.others, is_causal=False)
        for h in (hidden, changed)
    ]
    moved = (values[0] != values[1]).any(-1).any(1)[0]
    assert not moved[5]
    assert moved.sum() == 15


@pytest.mark.parametrize("layer_norm", [False, True])
def test_contenders_have_equal_parameters(layer_norm):
    """And the same numbers at the start, so that only the attention differs."""
    size = Size(layers=2, embed_dim=12, num_heads=3, layer_norm=layer_norm)
    models = []
    for attention in ATTENTIONS:
        torch.manual_seed(5)
        models.append(symmetric.Measurer(size, attention))
    assert sum(isinstance(module, torch.nn.LayerNorm) for module in models[0].modules()) == 4 * layer_norm
    for model in models[1:]:
        assert count_parameters(model) == count_parameters(models[0])
        assert all(map(torch.equal, model.parameters(), models[0].parameters()))
    tokens, _ = symmetric.make_batch(3, torch.Generator().manual_seed(0))
    outputs = [model(tokens) for model in models]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def symmetric_setting(**changes):
    """A run of a few steps."""
    given = {"attention": "inverse", "seed": 1, "size": TINY, "steps": 7, "batch_size": 3, "lr": 1e-3}
    return symmetric.Setting(**{**given, **changes})


def test_symmetric_training_reports_and_repeats():
    """A running mean for each step, the same numbers for the same seed, others for another."""
    said = []
    first = symmetric.train(symmetric_setting(), lambda step, state: said.append((step, state)))
    assert [step for step, _ in said] == list(range(1, 8))
    assert said[-1][1] == f"loss {first.loss[-1]:.3f}"
    assert len(first.loss) == 7
    assert first.solved_at is None
    again = symmetric.train(symmetric_setting(), lambda step, state: None)
    assert again.loss == first.loss
    assert symmetric.train(symmetric_setting(seed=2), lambda step, state: None).loss != first.loss


def test_symmetric_training_notes_where_it_is_solved(monkeypatch):
    """The first step at which the running mean is below the level."""
    setting = symmetric_setting(lr=1e-2, steps=20)
    loss = symmetric.train(setting, lambda step, state: None).loss
    assert loss[12] < min(loss[:12])
    monkeypatch.setattr(symmetric, "SOLVED", min(loss[:12]))
    assert symmetric.train(setting, lambda step, state: None).solved_at == 13


# --- text


@pytest.fixture(scope="module")
def corpus():
    return text.load_text()


def test_text_is_large_and_paragraphs_occur_once(corpus):
    """A held-out paragraph must not be one that a model has read."""
    assert len(corpus) > 200_000
    paragraphs = Counter(" ".join(paragraph.split()) for paragraph in corpus.split("\n\n"))
    assert max(paragraphs.values()) == 1
    assert "" not in paragraphs


def test_text_encodes_and_decodes(corpus):
    """What is not in the alphabet becomes its last sign, and is rare."""
    assert len(set(text.ALPHABET)) == len(text.ALPHABET) == 97
    back = text.decode(text.encode(corpus[:5000] + "é\t"))
    assert back.endswith("\ufffd\ufffd")
    assert all(b in (a, "\ufffd") for a, b in zip(corpus, back[:5000], strict=False))
    assert text.decode(text.encode(corpus)).count("\ufffd") < 0.01 * len(corpus)


def test_text_held_out_part_is_its_end(corpus):
    train, held_out = text.split(corpus)
    assert torch.equal(torch.cat([train, held_out]), text.encode(corpus))
    assert len(held_out) == len(corpus) // 10


def test_text_bits_of_frequencies():
    """Two characters, three to one, each counted once more for the other 95."""
    train, held_out = text.encode("aaab"), text.encode("ab")
    expected = -(math.log2(4 / 101) + math.log2(2 / 101)) / 2
    assert text.bits_of_frequencies(train, held_out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_text_model_is_causal(attention):
    """A later character changes nothing before it, and something from there on."""
    torch.manual_seed(0)
    model = text.Writer(TINY, attention, context=9)
    numbers = torch.randint(97, (2, 9))
    changed = numbers.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 97
    before, after = model(numbers), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_text_bits_of_a_model_that_knows_nothing():
    """All characters are equally likely: log2 of their number, whatever the windows."""
    model = text.Writer(TINY, "inverse", context=9)
    torch.nn.init.zeros_(model.head[1].weight)
    torch.nn.init.zeros_(model.head[1].bias)
    bits = text.bits_per_character(model, torch.randint(97, (1003,)))
    assert bits == pytest.approx(math.log2(97), rel=1e-5)


def test_text_bits_predict_what_follows():
    """Each character once, from those before it and never from itself: a model of `abab...` is sure and right."""
    model = text.Writer(TINY, "inverse", context=3)
    seen = []

    def sure(numbers):
        seen.append(numbers)
        following = text.encode("ba")[(numbers == text.encode("b")).long()]
        return torch.nn.functional.one_hot(following, 97) * 100.0

    model.forward = sure
    assert text.bits_per_character(model, text.encode("ab" * 8)) == pytest.approx(0.0, abs=1e-6)
    assert torch.cat(seen).shape == (5, 3)


def test_text_training_reports_and_writes(corpus, monkeypatch):
    """Held-out bits fall, evenly measured; the sample goes on from its prompt; the seed decides everything."""
    monkeypatch.setattr(text, "load_text", lambda: corpus[:3000])
    setting = text.Setting("negative", 0, TINY, steps=30, batch_size=4, lr=1e-2, context=17, sample=25)
    said = []
    result = text.train(setting, lambda step, state: said.append(state))
    assert len(said) == 30
    assert len(result.steps) == len(result.bits) == text.MEASUREMENTS
    assert result.steps[-1] == 30
    assert result.steps == sorted(set(result.steps))
    assert result.bits[-1] < result.bits[0]
    assert result.sample.startswith("The ")
    assert len(result.sample) == 4 + 25
    assert f"held out {result.bits[-1]:.3f}" in said[-1]
    again = text.train(setting, lambda step, state: None)
    assert (again.bits, again.sample) == (result.bits, result.sample)


# --- several runs at once


def double(setting, report):
    """Stands for a training run: its result follows from the setting."""
    for step in range(1, 4):
        report(step, f"state {step} of {setting}")
    if setting == "fails":
        raise ValueError("run failed")
    return 2 * setting


def test_runs_results_are_in_order(capsys):
    """Whichever ends first; where there is no terminal, a line for each run."""
    assert runs.run_all(double, {"a": 3, "b": 5, "c": 8}, 3, 2, Console(width=100)) == [6, 10, 16]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["a  state 3 of 3", "b  state 3 of 5", "c  state 3 of 8"]


def test_runs_bars_and_failures(capsys):
    """On a terminal bars move; one run's exception ends the others and reaches the caller, with its own message."""
    console = Console(width=100, force_terminal=True)
    with pytest.raises(ValueError, match="run failed"):
        runs.run_all(double, {"a": "fails", "b": 5}, 3, 1, console)
    assert re.search(r"3/3.*state 3 of fails", capsys.readouterr().out)


def test_mean_and_range():
    assert mean_and_range([2.0, 1.0, 1.5], 2) == "1.50 (1.00 to 2.00)"


# --- the scripts


def test_train_symmetric_table_and_picture(tmp_path, capsys):
    """A line for each run, a row for each setting, and a picture."""
    picture = tmp_path / "symmetric.svg"
    tiny = "--steps 5 --batch-size 3 --seeds 2 --width 8 --heads 2 --layers 1,2 --layer-norm on,off --processes 1"
    train_symmetric.main([*tiny.split(), "--output", str(picture)])
    shown = capsys.readouterr().out
    assert (
        len(re.findall(r"^[12] layers?, LayerNorm o.+, .+, seed [01]  loss \d", shown, re.MULTILINE)) == 2 * 2 * 2 * 2
    )
    rows = re.findall(r"│ (\d) +│ (on|off) +│ (\w+).*never, never", shown)
    assert rows == [(layers, norm, name) for norm in ("on", "off") for layers in "12" for name in ("dot", "L1")], shown
    assert picture.read_text().count("<svg") == 1


def test_train_text_table_sample_and_picture(tmp_path, capsys):
    """A row and a sample for each attention."""
    picture = tmp_path / "text.png"
    tiny = "--steps 3 --batch-size 2 --seeds 1 --width 4 --heads 1 --layers 1 --context 33 --sample 9 --processes 1"
    train_text.main([*tiny.split(), "--output", str(picture)])
    shown = capsys.readouterr().out
    rows = re.findall(r"│ (dot product|L1 \"\w+\") +│ +([\d,]+) │ +\d\.\d+ \(", shown)
    assert [name for name, _ in rows] == ["dot product", 'L1 "inverse"', 'L1 "negative"'], shown
    assert len({parameters for _, parameters in rows}) == 1
    assert shown.count("\nThe ") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", [train_symmetric, train_text])
def test_demo_help(script, capsys):
    """It explains the problem and every option, with its default."""
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert script.__doc__.strip().splitlines()[0] in shown
    assert len(re.findall(r"\(default:\s", shown)) == shown.count("\n  --")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, got 0"),
        (["--seeds", "-1"], "--seeds: must be a whole number of at least 1, got -1"),
        (["--lr", "nan"], "--lr: must be a finite number above 0, got nan"),
        (["--lr", "fast"], "--lr: must be a finite number above 0, got fast"),
        (["--attention", "dot,l1"], "--attention: must be some of dot,inverse,negative, each once, got dot,l1"),
        (["--attention", "dot,dot"], "--attention: must be some of dot,inverse,negative, each once, got dot,dot"),
        (["--width", "30"], "--width must be a multiple of --heads, got 30 and 4"),
        (["--output", "/nowhere/picture.png"], "--output must lie in an existing folder, got /nowhere/picture.png"),
        (["--output", "picture.doc"], "--output must end in .png, .svg or .pdf, got picture.doc"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_demo_options_errors(arguments, message, capsys):
    """The message names the option, what it must be and what came."""
    parser = options.make_parser("")
    options.add_shared(parser, attention="dot", steps=1, batch_size=1, lr=1.0, output="picture.png")
    with pytest.raises(SystemExit) as stopped:
        options.check_shared(parser, parser.parse_args(arguments))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (train_symmetric, ["--layers", "3"], "--layers: must be some of 1,2, each once, got 3"),
        (train_symmetric, ["--layer-norm", "maybe"], "--layer-norm: must be some of off,on, each once, got maybe"),
        (train_symmetric, ["--width", "30"], "--width must be a multiple of --heads, got 30 and 4"),
        (train_text, ["--context", "0"], "--context: must be a whole number of at least 1, got 0"),
        (train_text, ["--context", "40000"], "--context must be at most"),
        (train_text, ["--width", "30"], "--width must be a multiple of --heads, got 30 and 4"),
    ],
)
def test_demo_scripts_errors(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_pictures_of_the_readme_exist():
    """Small enough for a repository, and each beside a command that makes it: those of the benchmark have one."""
    if not (ROOT / "docs").exists():
        pytest.skip("an installed package has no pictures")
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"!\[.*?\]\((docs/pictures/.*?)\)", readme)
    assert sorted(shown) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/pictures").iterdir())
    for picture in shown:
        assert (ROOT / picture).stat().st_size < 150_000
        of_benchmark = picture.endswith(("-roofline.png", "-lengths.png"))
        assert ("scripts/bench.py --plot" if of_benchmark else f"--output {picture}") in readme
