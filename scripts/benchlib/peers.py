"""The contenders: this library, and every other way to get the same scores that is installed.

Each peer is a function of (query, key). All compute 1 / (EPS + sum_k |q - k|).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchlib.cases import Case

EPS = 1e-3
OURS = "ours"
CDIST_TERMS = 2**31 - 1  # of a call on a GPU: its indices are 32-bit


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
    """torch.cdist(p=1) followed by the score; on a GPU as many heads at a time as it can do."""
    if why := cdist_cannot(device, case.q_len, case.k_len, case.channels):
        raise Unavailable(why)

    def scores(query: Any, key: Any) -> Any:
        if device != "cuda" or query.shape[0] * query.shape[1] * key.shape[1] * key.shape[2] <= CDIST_TERMS:
            return 1.0 / (EPS + torch.cdist(query, key, p=1.0))
        return torch.cat([1.0 / (EPS + torch.cdist(q, k, p=1.0)) for q, k in cdist_parts(query, key)])

    return Peer("cdist", scores)


def cdist_cannot(device: str, q_len: int, k_len: int, channels: int) -> str:
    """Why torch.cdist cannot do one head, or nothing."""
    if device == "cuda" and q_len * k_len * channels > CDIST_TERMS:
        return "torch.cdist ends in an illegal memory access from 2**31 terms on"
    return ""


def cdist_parts(query: Any, key: Any, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Slices of all arrays along the heads, none with more than CDIST_TERMS if a head has no more."""
    heads = max(1, CDIST_TERMS // (query.shape[-2] * key.shape[-2] * key.shape[-1]))
    return zip(*(x.split(heads) for x in (query, key, *others)), strict=True)


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


def on_all_threads(distances: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any], Any]:
    """(query, key) -> scores in NumPy's float64; ``distances`` fills those of a head, each thread has its heads.

    SciPy's loops run without the GIL, on one core; one head after another would leave the other cores idle.
    """
    import numpy as np

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def part(query: Any, key: Any, out: Any) -> None:
        for q, k, o in zip(query, key, out, strict=True):
            distances(q, k, o)
        out += EPS
        np.reciprocal(out, out=out)

    def scores(query: Any, key: Any) -> Any:
        out = np.empty((len(query), query.shape[1], key.shape[1]))
        parts = [np.array_split(x, min(threads, len(query))) for x in (query, key, out)]
        list(pool.map(part, *parts))
        return out

    return scores


def host_peer(name: str, distances: Callable[[Any, Any, Any], None], device: str) -> Peer:
    """One that has no GPU path and no gradient."""
    if device != "cpu":
        raise Unavailable(f"{name} has no GPU path")
    note = "float64, heads on all threads, no gradient"
    scores = on_all_threads(distances)
    return Peer(name, scores, note, ("forward",), prepare=lambda x: x.double().numpy(), differentiable=False)


def scipy_cdist(case: Case, device: str) -> Peer:
    """SciPy's cityblock distance, on inputs converted to float64 beforehand."""
    try:
        from scipy.spatial.distance import cdist as scipy_distance
    except ImportError as error:
        raise Unavailable("SciPy is missing: pip install 'l1attn_cupy[bench]'") from error

    def distances(q: Any, k: Any, out: Any) -> None:
        scipy_distance(q, k, "cityblock", out=out)

    return host_peer("scipy", distances, device)


def sklearn_manhattan(case: Case, device: str) -> Peer:
    """scikit-learn's, which for dense arrays is SciPy's after checks of its own.

    Its DistanceMetric takes float32, but is slower.
    """
    try:
        from sklearn.metrics.pairwise import manhattan_distances
    except ImportError as error:
        raise Unavailable("scikit-learn is missing: pip install 'l1attn_cupy[bench]'") from error

    def distances(q: Any, k: Any, out: Any) -> None:
        out[:] = manhattan_distances(q, k)

    return host_peer("sklearn", distances, device)


def gpu_peer(name: str, device: str, fill: Callable[[Any, Any, Any], Any]) -> Peer:
    """One that has no CPU path and no gradient, and takes one head at a time; ``fill`` writes its distances."""
    if device != "cuda":
        raise Unavailable(f"{name} has no CPU path")

    def scores(query: Any, key: Any) -> Any:
        dtype = torch.promote_types(query.dtype, torch.float32)  # 16-bit inputs are summed in float32
        out = torch.empty(*query.shape[:2], key.shape[1], device=query.device, dtype=dtype)
        for q, k, o in zip(query, key, out, strict=True):
            fill(q, k, o)
        return out.add_(EPS).reciprocal_()

    return Peer(name, scores, "a call per head, no gradient", ("forward",), differentiable=False)


def cuvs(case: Case, device: str) -> Peer:
    """cuVS on torch's stream, which spares a wait after each head."""
    try:
        from cuvs.common import Resources
        from cuvs.distance import pairwise_distance
    except ImportError as error:
        raise Unavailable(f"cuVS is not installed: {error}; pip install cuvs-cu12 or cuvs-cu13") from error
    legacy_default_stream = 1  # its handle; cuVS takes 0 for a stream of its own
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    resources = Resources(stream=stream or legacy_default_stream)
    return gpu_peer("cuvs", device, lambda q, k, o: pairwise_distance(q, k, o, "cityblock", resources=resources))


def cupyx_cdist(case: Case, device: str) -> Peer:
    """CuPy's SciPy interface, which calls cuVS and waits for each head."""
    try:
        from cupy import from_dlpack
        from cupyx.scipy.spatial import distance
    except ImportError as error:
        raise Unavailable(f"CuPy is not installed: {error}; pip install cupy-cuda12x or cupy-cuda13x") from error
    if not (distance.cuvs_available or distance.pylibraft_available):
        raise Unavailable("cupyx.scipy.spatial.distance needs cuVS, which is not installed")

    def fill(q: Any, k: Any, out: Any) -> None:
        distance.cdist(from_dlpack(q), from_dlpack(k), "cityblock", out=from_dlpack(out))

    return gpu_peer("cupyx", device, fill)


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
    "sklearn": sklearn_manhattan,
    "keops": keops,
    "cuvs": cuvs,
    "cupyx": cupyx_cdist,
}
OTHER_DEVICE = {"cpu": {"cuvs", "cupyx"}, "cuda": {"scipy", "sklearn"}}  # peers that a device has no use for
