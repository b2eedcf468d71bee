#!/usr/bin/env python3
"""Take each barrier out of each kernel, one at a time: the emulator must notice.

    python scripts/mutate_barriers.py                       the kernels of this package
    python scripts/mutate_barriers.py --kernels FOLDER      your own

`__syncthreads()` is removed, `__syncthreads_and(x)` becomes `(x)`; then each variant of the file runs on a small
problem. With the emulator's checks on, it must report an error, or the result must be wrong; the kernel as it is must
be right. With the checks off, the table says in how many of the seeds the numbers are wrong; that is for information,
and left out with --checks-only.
Exit status 1 if a mutant survives, which says that its barrier is not needed or that a test is missing.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import l1attn_cupy as l1
from l1attn_cupy import testing, testing_attention
from l1attn_cupy.cuda import registry
from l1attn_cupy.cuda.registry import Variant
from l1attn_cupy.emulator.engine import EmulatorError

SEEDS = 3

# Two blocks and more in each direction, and several chunks of channels and of rows within a block.
LENGTHS_Q = (129, 33)  # the second for variants that take only few queries
LENGTH_K, CHANNELS = 97, 65
ATTENTION_LENGTH_Q, CHANNELS_V = 9, 70
SPLIT_LENGTH_K = 2203  # keys that so many blocks share that several warps join what they made

_BARRIER = re.compile(r"\b__syncthreads(?:_and|_or|_count)?\s*\(")


@dataclass(frozen=True)
class Mutant:
    """A kernel file with one barrier less; with ``line`` 0, as it is."""

    name: str
    line: int
    barrier: str
    text: str


def mutants(path: Path) -> Iterator[Mutant]:
    """The file as it is, then one mutant for each barrier in its code."""
    text = path.read_text(encoding="utf-8")
    yield Mutant(path.name, 0, "", text)
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)  # of the same length
    for match in _BARRIER.finditer(code):
        end = _closing(code, match.end())
        argument = text[match.end() : end].strip()
        less = text[: match.start()] + (f"({argument})" if argument else "") + text[end + 1 :]
        yield Mutant(path.name, text.count("\n", 0, match.start()) + 1, text[match.start() : end + 1], less)


def _closing(code: str, at: int) -> int:
    """Where the parenthesis that was opened before ``at`` is closed."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        at += 1
    return at - 1


# ---- in a process of its own --------------------------------------------------------------------------------------


def outcomes(mutant: Mutant, folder: str, check: bool) -> list[str]:
    """For each variant of the file: "" if its results are right, else what is wrong."""
    Path(folder, mutant.name).write_text(mutant.text, encoding="utf-8")
    os.environ.update(
        L1ATTN_KERNELS=folder,
        L1ATTN_EMULATOR_CHECK=str(int(check)),  # looked up when a kernel is compiled: another folder is another kernel
        L1ATTN_EMULATOR_TIME_LIMIT="60",
        L1ATTN_CACHE_DIR=str(Path(folder).parent / "cache"),
    )
    own = [v for v in registry.variants() if v.path.parent == Path(folder) and v.path.name == mutant.name]
    return [_outcome(variant, 1 if check else SEEDS) for variant in own]


def _outcome(variant: Variant, seeds: int) -> str:
    if variant.op.startswith("attention"):
        return _attention_outcome(variant, seeds)
    length_q = next(n for n in LENGTHS_Q if _comes_to(variant, n))
    dtype = "float32" if variant.op == "scores_quantized" else variant.dtypes[0]
    query, key, grad = testing.inputs((length_q, CHANNELS), (LENGTH_K, CHANNELS), dtype)
    options: dict[str, Any] = {"score": "negative", "scale": 0.1}
    expected = testing.Expected(query, key, grad, **options)
    wrong = 0
    for _ in range(seeds):  # each launch takes the next seed
        try:
            if variant.op == "scores_quantized":
                q, k, quant_scale = l1.quantize_for_l1(query, key, dtype=variant.dtypes[0])
                own = {"quant_scale": quant_scale, "backend": "emulator", "variant": variant.name}
                wrong += expected.scores(l1.l1_scores(q, k, **own, **options)).error > 0.05
            elif variant.op == "scores_forward":
                scores = l1.l1_scores(query, key, backend="emulator", variant=variant.name, **options)
                wrong += expected.scores(scores).error > 0.05  # a missing barrier is no matter of rounding
            else:
                gradients = l1.l1_scores_backward(grad, query, key, backend="emulator", variant=variant.name, **options)
                wrong += max(agreement.error for agreement in expected.gradients(*gradients)) > 0.05
        except EmulatorError as error:
            return _kind(str(error))
    return f"wrong in {wrong} of {seeds}" if wrong else ""


def _attention_outcome(variant: Variant, seeds: int) -> str:
    merges = variant.op == "attention_merge"
    length_k = SPLIT_LENGTH_K if merges else LENGTH_K
    shapes, mask_of = ((ATTENTION_LENGTH_Q, CHANNELS), (length_k, CHANNELS)), ("added", (length_k,))
    of_bytes = variant.dtypes[0] in registry.BYTES.values()
    dtype = "float32" if of_bytes else variant.dtypes[0]
    given = testing_attention.inputs(*shapes, CHANNELS_V, dtype, mask=mask_of)
    call: dict[str, Any] = {"score": "negative", "scale": 0.1}
    if of_bytes:
        q, k, quant_scale = l1.quantize_for_l1(given.query, given.key, dtype=variant.dtypes[0])
        given = given._replace(query=q.float(), key=k.float())
        call["scale"] *= quant_scale.item()
    query, key, value, mask, grad, grad_lse = given
    expected = testing_attention.ExpectedAttention(*given, **call)
    if of_bytes:
        query, key = q, k
    out, lse = l1.l1_attention(query, key, value, mask, return_lse=True, **call)
    own: dict[str, Any] = {"backend": "emulator", "variant": None if merges else variant.name, **call}
    wrong = 0
    for _ in range(seeds):
        try:
            if variant.op in ("attention_forward", "attention_merge"):
                found = expected.results(*l1.l1_attention(query, key, value, mask, return_lse=True, **own))
            else:
                gradients = l1.l1_attention_backward(
                    grad, query, key, value, out, lse, mask, grad_lse=grad_lse, return_dmask=True, **own
                )
                found = expected.gradients(*gradients)
            wrong += max(agreement.error for agreement in found) > 0.05
        except EmulatorError as error:
            return _kind(str(error))
    return f"wrong in {wrong} of {seeds}" if wrong else ""


def _comes_to(variant: Variant, length_q: int) -> bool:
    """Whether a call by the variant's name comes to this line of its file."""
    sizes = {"q": length_q, "k": LENGTH_K, "e": CHANNELS}
    return registry.choose(variant.op, variant.dtypes[0], sizes, variant.name) == variant


def _kind(message: str) -> str:
    """ "race", "divergent barrier" and the like, from an emulator's message."""
    return message.partition(": ")[2].partition(":")[0].partition(",")[0].split("\n")[0]


# ---- the table ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernels", type=Path, metavar="FOLDER", help="whose .cu files to mutate (default: the package's)"
    )
    parser.add_argument("--checks-only", action="store_true", help="do not run the mutants without checks")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: at most 2)")
    options = parser.parse_args()
    files = sorted((options.kernels or registry.packaged_folder()).glob("*.cu"))
    if not files:
        parser.error(f"there is no .cu file in {options.kernels}")
    todo = [mutant for file in files for mutant in mutants(file)]
    print("Each barrier taken out, one at a time; what the emulator says (variants that differ: with |).\n")
    print(f"{'barrier':70} {'with checks':38} without checks")
    with tempfile.TemporaryDirectory(prefix="l1attn-mutants-") as folder:
        rows = _run(todo, Path(folder), options)
    bad = sum([_print_row(mutant, *found) for mutant, found in zip(todo, rows, strict=True)])
    print(f"\n{bad} NOT OK" if bad else f"\nAll {sum(mutant.line > 0 for mutant in todo)} mutants were noticed.")
    return 1 if bad else 0


def _run(todo: list[Mutant], folder: Path, options: argparse.Namespace) -> list[tuple[list[str], list[str]]]:
    """The outcomes of all mutants with checks and without, each in a folder of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, 2 * len(todo)), context) as pool:

        def start(mutant: Mutant, check: bool) -> Future[list[str]]:
            own = Path(tempfile.mkdtemp(dir=folder))
            return pool.submit(outcomes, mutant, str(own), check)

        checked = [start(mutant, True) for mutant in todo]
        unchecked = [] if options.checks_only else [start(mutant, False) for mutant in todo]
        return [(x.result(), y.result() if y else []) for x, y in itertools.zip_longest(checked, unchecked)]


def _print_row(mutant: Mutant, checked: list[str], unchecked: list[str]) -> bool:
    """Print one line of the table; returns whether it is bad: a mutant unnoticed, or the kernel itself wrong."""
    place = f"{mutant.name}:{mutant.line} {mutant.barrier}" if mutant.line else f"{mutant.name} as it is"
    bad = not any(checked) if mutant.line else any(checked + unchecked)
    print(f"{place:70} {_short(checked):38} {_short(unchecked)}{'   NOT OK' if bad else ''}", flush=True)
    return bad


def _short(outcomes: list[str]) -> str:
    """Of all variants; one word if they agree."""
    return " | ".join(dict.fromkeys(outcome or "right" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
