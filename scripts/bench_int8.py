#!/usr/bin/env python3
"""8-bit query and key: how fast, how far off, and what becomes of trained models.

    python scripts/bench_int8.py                          everything on the CPU, some minutes, most of them training
    python scripts/bench_int8.py --only speed             time beside float32
    python scripts/bench_int8.py --only error             error of distances and of attention, by kind of numbers
    python scripts/bench_int8.py --only models            digits and text, before and after query and key are quantised
    python scripts/bench_int8.py --device cuda --json F   speed on a GPU, beside float16 and half2, and the limit

speed   Median of rounds in which all take turns; terms, |q - k| in one sum, per second. On the CPU by core time, all
        that threads had over their number: other processes do not disturb it, but threads that spin count as busy,
        as torch's own do in "quantise", which is `quantize_for_l1` alone. No other line has its time.
error   Root mean square of what is off, over that of what is exact: of distances, and of the result of attention
        with each score and scale E ** -0.5. "blocks of n": a scale for each n channels, which no kernel has, to see
        whether it would help; "blocks of 1" is a scale for each channel. "not moved": without each channel's own least
        number taken off, as a dot product would have it.
models  Trained in float32, evaluated on the held-out part as they are and with 8-bit query and key in all layers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import l1attn_cupy as l1

PARTS = ("speed", "error", "models")
SHAPES = {"cpu": ((8, 1024, 1024, 64), (8, 1024, 1024, 128)), "cuda": ((8, 1024, 1024, 64), (16, 2048, 2048, 64))}
STEPS = 255
WARM_UP = 2  # rounds
BLOCKS = (64, 32, 16, 8, 1)
Call = Callable[[], Any]


# ---- speed --------------------------------------------------------------------------------------------------------


def contestants(shape: tuple[int, ...], device: str) -> dict[str, Call]:
    """What takes turns, by name."""
    batch, length_q, length_k, channels = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, n, channels, generator=generator).to(device) for n in (length_q, length_k, length_k)
    )
    q8, k8, quant_scale = l1.quantize_for_l1(query, key)
    found: dict[str, Call] = {
        "scores float32": lambda: l1.l1_scores(query, key),
        "scores int8": lambda: l1.l1_scores(q8, k8, quant_scale=quant_scale),
        "attention float32": lambda: l1.l1_attention(query, key, value),
        "attention int8": lambda: l1.l1_attention(q8, k8, value, quant_scale=quant_scale),
        "quantise": lambda: l1.quantize_for_l1(query, key),
    }
    if device == "cuda":
        half_q, half_k = query.half(), key.half()
        found["scores float16"] = lambda: l1.l1_scores(half_q, half_k, scale=channels**-0.5)
        found["scores half2"] = lambda: l1.l1_scores(half_q, half_k, scale=channels**-0.5, variant="half2")
    return found


def limits(device: str) -> dict[str, Call]:
    """On a GPU, loops of nothing but the arithmetic of a term: seconds of 1e9 terms."""
    if device != "cuda":
        return {}
    from l1attn_cupy.lab import gpu

    return {
        f"limit {name}": gpu.CudaLimit("forward", name).seconds_per_1e9_terms for name in ("float32", "float16", "int8")
    }


def speed(device: str, rounds: int) -> list[dict[str, Any]]:
    """Times of all contestants, and a table."""
    if device == "cuda":
        from l1attn_cupy.lab import gpu

        clock: Any = gpu.CudaClock()
    else:
        clock = None
    records = []
    for shape in SHAPES[device]:
        calls, bounds = contestants(shape, device), limits(device)
        times: dict[str, list[float]] = {name: [] for name in (*calls, *bounds)}
        for turn in range(rounds + WARM_UP):
            taken = {name: _seconds(call, clock) for name, call in calls.items()}
            taken |= {name: bound() for name, bound in bounds.items()}
            for name, seconds in taken.items() if turn >= WARM_UP else ():
                times[name].append(seconds)
        terms = math.prod(shape)
        print(f"\n{f'{shape}: {terms / 1e9:.3g}e9 terms':40} {'ms':>10}  1e9 terms/s (min..max)")
        for name, every in times.items():
            bound = name in bounds
            rates = sorted((1.0 if bound else terms / 1e9) / t for t in every)
            middle = statistics.median(rates)
            milliseconds = "" if bound else f"{1e-6 * terms / middle:.3f}"
            print(f"  {name:38} {milliseconds:>10} {middle:12.1f} ({rates[0]:.1f}..{rates[-1]:.1f})")
            records.append({"shape": shape, "what": name, "rate": middle, "low": rates[0], "high": rates[-1]})
    return records


def _seconds(call: Call, clock: Any) -> float:
    if clock is None:
        start = time.process_time()
        call()
        return (time.process_time() - start) / torch.get_num_threads()
    clock.before_call()
    start = clock.stamp()
    call()
    return clock.seconds(start, clock.stamp())


# ---- error --------------------------------------------------------------------------------------------------------


def rounded(query: Tensor, key: Tensor, block: int, moved: bool) -> tuple[Tensor, Tensor]:
    """Query and key as 8 bits hold them, with a scale for each ``block`` channels; float64."""
    both = torch.cat([query, key], -2).double()
    parts = []
    for part in both.split(block, -1):
        least = part.amin(-2, keepdim=True) if moved else -part.abs().amax((-2, -1), keepdim=True)
        width = part.amax(-2, keepdim=True) - least if moved else -2 * least
        step = width.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / STEPS
        parts.append(least + step * ((part - least) / step).round().clamp(0, STEPS))
    q, k = torch.cat(parts, -1).split([query.shape[-2], key.shape[-2]], -2)
    return q.contiguous(), k.contiguous()


def errors(query: Tensor, key: Tensor, q: Tensor, k: Tensor) -> dict[str, float]:
    """Of distances, and of attention to random values."""
    found = {"distance": _relative(*(l1.l1_scores(*pair, score="distance") for pair in ((q, k), (query, key))))}
    value = torch.randn(*key.shape[:-1], 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for score in ("inverse", "negative"):
        call = partial(l1.l1_attention, score=score, scale=query.shape[-1] ** -0.5)
        found[score] = _relative(call(q, k, value), call(query, key, value))
    return found


def _relative(result: Tensor, exact: Tensor) -> float:
    return ((result - exact).square().mean() / exact.square().mean()).sqrt().item()


def error_table(samples: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """A line for each kind of numbers and way to round them."""
    print(f"\n{'relative error of':60}{'distances':>12}{'inverse':>12}{'negative':>12}")
    records = []
    for name, (query, key) in samples.items():
        query, key = query.double(), key.double()
        channels = query.shape[-1]
        ways = {"one scale": (channels, True), "one scale, not moved": (channels, False)}
        ways |= {f"blocks of {n}": (n, True) for n in BLOCKS if n < channels}
        for way, (block, moved) in ways.items():
            found = errors(query, key, *rounded(query, key, block, moved))
            print(f"{name + ', ' + way:60}" + "".join(f"{100 * x:11.3f}%" for x in found.values()), flush=True)
            records.append({"numbers": name, "rounding": way, **found})
    return records


def drawn() -> dict[str, tuple[Tensor, Tensor]]:
    """Numbers of known distributions, 4 heads of length 512 and 64 channels."""
    torch.manual_seed(0)
    shape = (4, 512, 64)
    kinds = {"normal": torch.distributions.Normal(0.0, 1.0), "Student t, 3 dof": torch.distributions.StudentT(3.0)}
    found = {name: (kind.sample(shape), kind.sample(shape)) for name, kind in kinds.items()}
    spread = torch.randn(64).exp()
    found["normal, channels of widths e^N(0,1)"] = tuple(spread * x for x in found["normal"])  # type: ignore[assignment]
    return found


# ---- models -------------------------------------------------------------------------------------------------------


def quantised_scores(query: Tensor, key: Tensor, score: str) -> Tensor:
    """`train_digits.l1_attention_scores` in 8 bits."""
    q8, k8, quant_scale = l1.quantize_for_l1(query, key)
    return l1.l1_scores(q8, k8, quant_scale=quant_scale, score=score, scale=query.shape[-1] ** -0.5)


def quantised_attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, is_causal: bool, score: str
) -> Tensor:
    """`demolib.model.l1_attend` in 8 bits."""
    q8, k8, quant_scale = l1.quantize_for_l1(query, key)
    scale = query.shape[-1] ** -0.5
    return l1.l1_attention(
        q8, k8, value, attn_mask, is_causal=is_causal, quant_scale=quant_scale, score=score, scale=scale
    )


def digits(seed: int, epochs: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Accuracy before and after, and query and key of the last block."""
    import train_digits

    args = train_digits.parse_args(["--seed", str(seed), "--epochs", str(epochs)])
    split = train_digits.load_split(args.seed)
    before = partial(train_digits.l1_attention_scores, score=args.score)
    model, history = train_digits.train(before, split, args, lambda _: None)
    seen: list[tuple[Tensor, Tensor]] = []

    def after(query: Tensor, key: Tensor) -> Tensor:
        seen.append((query, key))
        return quantised_scores(query, key, args.score)

    for block in model.blocks:
        block.scores = after  # type: ignore[assignment]
    found = train_digits.accuracy(model, split.test_images, split.test_labels)
    record = {"model": "digits", "score": args.score, "seed": seed, "before": history.accuracy[-1], "after": found}
    return record, (seen[-1][0][:64].flatten(0, 1), seen[-1][1][:64].flatten(0, 1))


def text(seed: int, score: str, steps: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Bits per held-out character before and after, and query and key of the last block."""
    import train_text
    from demolib import text as language

    args = train_text.parse_args(["--attention", score, "--seeds", "1", "--steps", str(steps), "--sample", "1"])
    (setting,) = train_text.make_settings(args)
    setting = type(setting)(**{**setting.__dict__, "seed": seed})
    model, result = language.train_model(setting, lambda *_: None)
    seen: list[tuple[Tensor, Tensor]] = []

    def after(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((query, key))
        return quantised_attend(query, key, *rest, **options, score=score)

    for block in model.blocks.blocks:
        block.attend = after  # type: ignore[assignment]
    _, held_out = language.split(language.load_text())
    found = language.bits_per_character(model, held_out)
    record = {"model": "text", "score": score, "seed": seed, "before": result.bits[-1], "after": found}
    return record, (seen[-1][0][:16].flatten(0, 1), seen[-1][1][:16].flatten(0, 1))


def models(seeds: int, epochs: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """All of them, and their activations."""
    records: list[dict[str, Any]] = []
    activations: dict[str, tuple[Tensor, Tensor]] = {}
    print(f"\n{'held-out part':32}{'float32':>12}{'int8':>12}")
    for seed in range(seeds):
        runs = {"digits, accuracy": partial(digits, seed, epochs)}
        runs |= {f'text "{s}", bits/character': partial(text, seed, s, steps) for s in ("inverse", "negative")}
        for name, run in runs.items():
            record, pair = run()
            records.append(record)
            activations.setdefault(f"activations, {name.partition(',')[0]}", pair)
            print(f"{name + f', seed {seed}':32}{record['before']:12.4f}{record['after']:12.4f}", flush=True)
    return records, activations


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", help=f"comma-separated of {', '.join(PARTS)} (default all; on a GPU speed)")
    parser.add_argument("--rounds", type=int, default=15, help="of speed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="of digits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of text (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    options = parser.parse_args()
    parts = (options.only or ("speed" if options.device == "cuda" else ",".join(PARTS))).split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device {device}, torch {torch.__version__}")
    result: dict[str, Any] = {"device": device}
    if "speed" in parts:
        result["speed"] = speed(options.device, options.rounds)
    samples = drawn()
    if "models" in parts:
        result["models"], activations = models(options.seeds, options.epochs, options.steps)
        samples |= activations
    if "error" in parts:
        result["error"] = error_table(samples)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
