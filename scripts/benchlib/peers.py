"""The contenders: this library, and every other way to get the same scores that is installed.

Each peer is a function of (query, key). All compute 1 / (EPS + sum_k |q - k|).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchlib.cases import Case

EPS = 1e-3
OURS = "ours"


class Unavailable(Exception):
    """Why a peer cannot run here; becomes the note of its row."""


@dataclass
class Peer:
    """How to call one contender.

    Attributes
    ----------
    scores
        (query, key) -> scores (batch, L, S); row sums (batch, L, 1) if `rows_only`.
    backward
        (grad_scores, query, key, scores) -> (dquery, dkey). None: through torch's autograd.
    prepare
        Turns a torch tensor into what `scores` takes, untimed.
    differentiable
        Whether there is a backward to time at all.
    """

    name: str
    scores: Callable[[Any, Any], Any]
    note: str = ""
    ops: tuple[str, ...] = ("forward", "backward", "forward+backward")
    backward: Callable[[Any, Any, Any, Any], Any] | None = None
    prepare: Callable[[Any], Any] = lambda tensor: tensor
    differentiable: bool = True
    rows_only: bool = False
    broadcasts: bool = False  # makes the (batch, L, S, E) tensor


def naive(query: Any, key: Any) -> Any:
    """The formula by broadcasting: the oracle's text, and what torch.compile is given."""
    return 1.0 / (EPS + (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1))


def ours(case: Case, device: str) -> Peer:
    """This library's default variant through torch's autograd, as a training step uses it."""
    l1 = import_ours()
    return Peer(OURS, lambda q, k: l1.l1_scores(q, k, score="inverse", eps=EPS))


def import_ours() -> Any:
    """The package, or Unavailable with what to do."""
    try:
        import l1attn_cupy as l1

        l1.l1_scores  # noqa: B018  a half-installed package has no API
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{error}; run from the repository root with PYTHONPATH=. or install it") from error
    return l1


def our_variants() -> list[Peer]:
    """One peer per kernel variant of the op, forward and backward apart; [] where there are none to choose from."""
    l1 = import_ours()
    if not hasattr(l1, "variants"):
        return []

    def forward_peer(name: str) -> Peer:
        def scores(q: Any, k: Any) -> Any:
            return l1.l1_scores(q, k, score="inverse", eps=EPS, variant=name)

        return Peer(f"{OURS} {name}", scores, ops=("forward",), differentiable=False)

    def backward_peer(name: str) -> Peer:
        def backward(g: Any, q: Any, k: Any, s: Any) -> Any:
            return l1.l1_scores_backward(g, q, k, score="inverse", eps=EPS, scores=s, variant=name)

        def scores(q: Any, k: Any) -> Any:
            return l1.l1_scores(q, k, score="inverse", eps=EPS)

        return Peer(f"{OURS} {name}", scores, "called directly", ("backward",), backward)

    makers = {"scores_forward": forward_peer, "scores_backward": backward_peer}
    return [make(name) for op, make in makers.items() for name in dict.fromkeys(variant_names(l1.variants(op)))]


def variant_names(listing: Any) -> list[str]:
    """Names out of what `variants(op)` returns: names, or records with a `name`."""
    names = [getattr(entry, "name", entry) for entry in listing]
    return [name if isinstance(name, str) else name[0] for name in names]


def eager(case: Case, device: str) -> Peer:
    """PyTorch's broadcasting, which makes the (batch, L, S, E) tensor."""
    return Peer("eager", naive, broadcasts=True)


def cdist(case: Case, device: str) -> Peer:
    """torch.cdist(p=1) followed by the score."""
    if device == "cuda" and case.terms("forward") >= 2**31:
        raise Unavailable("torch.cdist ends in an illegal memory access from 2**31 terms on")
    return Peer("cdist", lambda q, k: 1.0 / (EPS + torch.cdist(q, k, p=1.0)))


def with_inductor(function: Any, device: str, dynamic: bool = False) -> Any:
    """Through torch.compile; on a GPU it tries several tilings of each kernel, on the CPU there is one."""
    options: Any = {"max_autotune_pointwise": True} if device == "cuda" else None
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)


def compiled(case: Case, device: str) -> Peer:
    """Static shapes, except on the grid: one compilation with dynamic shapes serves all of it."""
    dynamic = case.group == "grid"
    if not dynamic:
        torch.compiler.reset()
    function = with_inductor(naive, device, dynamic)
    return Peer("compile", function, "dynamic shapes" if dynamic else "")


def scipy_cdist(case: Case, device: str) -> Peer:
    """SciPy's cityblock distance, head by head, on inputs converted to float64 beforehand."""
    try:
        from scipy.spatial.distance import cdist as scipy_distance
    except ImportError as error:
        raise Unavailable("SciPy is missing: pip install 'l1attn_cupy[bench]'") from error
    if device != "cpu":
        raise Unavailable("SciPy has no GPU path")
    import numpy as np

    def scores(q: Any, k: Any) -> Any:
        return np.stack([1.0 / (EPS + scipy_distance(a, b, "cityblock")) for a, b in zip(q, k, strict=True)])

    def prepare(tensor: Any) -> Any:
        return tensor.double().numpy()

    note = "float64, one thread, no gradient"
    return Peer("scipy", scores, note, ("forward",), prepare=prepare, differentiable=False)


def keops(case: Case, device: str) -> Peer:
    """KeOps never writes a matrix, so it sums each row of the scores; every term is computed all the same."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import pykeops
            from pykeops.torch import LazyTensor
    except Exception as error:
        raise Unavailable(f"KeOps: {error}; pip install 'l1attn_cupy[bench]', it needs a C++ compiler") from error
    pykeops.set_verbose(False)

    def scores(q: Any, k: Any) -> Any:
        lazy_q, lazy_k = LazyTensor(q[..., :, None, :]), LazyTensor(k[..., None, :, :])
        return (1.0 / ((lazy_q - lazy_k).abs().sum(-1) + EPS)).sum(q.ndim - 1)

    return Peer("keops", scores, "row sums only", rows_only=True)


PEERS: dict[str, Callable[[Case, str], Peer]] = {
    "ours": ours,
    "eager": eager,
    "cdist": cdist,
    "compile": compiled,
    "scipy": scipy_cdist,
    "keops": keops,
}
