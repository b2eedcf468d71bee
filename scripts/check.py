#!/usr/bin/env python3
"""Check L1 scores, fused attention and their gradients against the naive formula in float64 with autograd.

Every backend that can be used here, every score, every dtype, on random inputs and on tied ones: many
channels in which query and key are equal, and rows that are equal altogether. Prints a table; exit status 1
if anything in it is not ok.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import l1attn_cupy as l1
from l1attn_cupy import config, testing, testing_attention
from l1attn_cupy.functions import SCORES

# Shapes of query and key: work for more than one thread, broadcasting, more channels than one block.
SHAPES = [
    ((65, 65), (65, 65)),
    ((2, 1, 17, 33), (3, 19, 33)),
    ((1, 257), (2, 257)),
]

SHARED = {"enable_gqa": True}

# Shapes of query and key, channels of value, mask and options of attention.
ATTENTION: list[tuple[tuple[int, ...], tuple[int, ...], int, dict[str, Any], dict[str, Any]]] = [
    ((2, 65, 33), (2, 97, 33), 17, {}, {}),
    ((4, 33, 17), (2, 70, 17), 33, {"mask": ("added", (33, 70)), **SHARED}, {"window": (20, -1), **SHARED}),
    ((129, 65), (129, 65), 65, {"mask": ("bool", (129,))}, {"is_causal": True}),
    ((1, 17), (1500, 17), 16, {}, {}),
]

# For the emulator, which runs thread by thread.
SMALL: list[tuple[tuple[int, ...], tuple[int, ...], int, dict[str, Any], dict[str, Any]]] = [
    ((4, 5, 17), (2, 70, 17), 9, {"mask": ("added", (5, 70)), **SHARED}, {"window": (20, -1), **SHARED}),
]

HEADER = f"""\
L1 scores and their gradients against the naive formula in float64 with autograd, at odd shapes.
error   relative to the size of the terms that a result is the sum of; the element closest to its bound
bound   {testing.MULTIPLE} x the error of the naive formula in float32, plus rounding (l1attn_cupy/testing.py)
tied    a fifth of all channels are equal in query and key, and some rows equal altogether

backend   score      dtype     inputs     scores error    bound    gradients error    bound
"""

ATTENTION_HEADER = f"""
Attention: with masks, causality, a window, shared heads, and one query against many keys.
bound   {testing_attention.FORWARD_MULTIPLE} x (results) or {testing_attention.BACKWARD_MULTIPLE} x (gradients) the \
error of the naive formula in float32 (l1attn_cupy/testing_attention.py)

backend   score      dtype     inputs    results error    bound    gradients error    bound
"""


_Compare = Callable[[config.Backend, str, str, bool], tuple[testing.Agreement, testing.Agreement]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="check this one; may be repeated (default: all)"
    )
    chosen = _chosen(parser.parse_args().backend, parser)
    print(HEADER, end="")
    bad = 0
    for backend in chosen:
        if backend.missing:
            print(f"{backend.name:9} not checked: {backend.missing}")
            continue
        for score, dtype, ties in itertools.product(SCORES, testing.DTYPES, (False, True)):
            bad += not _print_row(_compare, backend, score, dtype, ties)
    print(ATTENTION_HEADER, end="")
    for backend in chosen:
        if backend.missing:
            print(f"{backend.name:9} not checked: {backend.missing}")
            continue
        for score, dtype, ties in itertools.product(SCORES, testing.DTYPES, (False, True)):
            bad += not _print_row(_compare_attention, backend, score, dtype, ties)
    print(f"\n{bad} NOT OK" if bad else "\nAll ok.")
    return 1 if bad else 0


def _chosen(names: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[config.Backend]:
    """The backends to check; one that was asked for and is missing is an error."""
    known = {backend.name: backend for backend in config.backends()}
    for name in names or ():
        if name not in known:
            parser.error(f"--backend must be one of {', '.join(known)}, got {name}")
        if known[name].missing:
            parser.error(f"the {name} backend cannot be used here: {known[name].missing}")
    return [known[name] for name in names or known]


def _print_row(compare: _Compare, backend: config.Backend, score: str, dtype: str, ties: bool) -> bool:
    """Check one combination and print its line; returns whether it is ok."""
    print(f"{backend.name:9} {score:10} {dtype:9} {'tied' if ties else 'random':8}", end=" ", flush=True)
    try:
        forward, backward = compare(backend, score, dtype, ties)
    except Exception as error:  # one that fails must not hide the others
        print(f"NOT OK: {type(error).__name__}: {error}")
        return False
    ok = forward.ok and backward.ok
    figures = [f"{found.error:14.1e} {found.bound:8.1e}" for found in (forward, backward)]
    print(f"{figures[0]}     {figures[1]}   {'ok' if ok else 'NOT OK'}")
    return ok


def _compare(
    backend: config.Backend, score: str, dtype: str, ties: bool
) -> tuple[testing.Agreement, testing.Agreement]:
    """The worst of all shapes: scores, and gradients both from saved scores and computed anew."""
    forward: list[testing.Agreement] = []
    backward: list[testing.Agreement] = []
    for shapes in SHAPES:
        query, key, grad = testing.inputs(*shapes, dtype, ties=ties)
        options = {"score": score, "scale": query.shape[-1] ** -0.5}
        on_device = [array.to(backend.device) for array in (grad, query, key)]
        scores, saved = _autograd(*on_device, backend=backend.name, **options)
        anew = l1.l1_scores_backward(*on_device, backend=backend.name, **options)
        expected = testing.Expected(query, key, grad, **options)
        forward.append(expected.scores(scores.cpu()))
        for dquery, dkey in (saved, anew):
            backward += expected.gradients(dquery.cpu(), dkey.cpu())
    return max(forward, key=_closeness), max(backward, key=_closeness)


def _compare_attention(
    backend: config.Backend, score: str, dtype: str, ties: bool
) -> tuple[testing.Agreement, testing.Agreement]:
    """The worst of `ATTENTION`: out and lse, and the gradients by autograd."""
    forward: list[testing.Agreement] = []
    backward: list[testing.Agreement] = []
    for query_shape, key_shape, channels_v, masks, places in SMALL if backend.name == "emulator" else ATTENTION:
        given = testing_attention.inputs(query_shape, key_shape, channels_v, dtype, ties=ties, **masks)
        options = {"score": score, "scale": query_shape[-1] ** -0.5, **places}
        results = testing_attention.run(given.to(backend.device), backend=backend.name, **options)
        out, lse, *gradients = (x.cpu() for x in results)
        expected = testing_attention.ExpectedAttention(*given, **options)
        forward += expected.results(out, lse)
        backward += expected.gradients(*gradients)
    return max(forward, key=_closeness), max(backward, key=_closeness)


def _autograd(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, **options: object
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Scores, and the gradients that autograd computes from them."""
    leaves = [array.requires_grad_() for array in (query.clone(), key.clone())]
    call: Callable[..., torch.Tensor] = l1.l1_scores
    scores = call(*leaves, **options)
    return scores.detach(), torch.autograd.grad(scores, leaves, grad)


def _closeness(found: testing.Agreement) -> float:
    return found.error / found.bound


if __name__ == "__main__":
    sys.exit(main())
