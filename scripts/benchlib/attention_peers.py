"""The contenders for fused attention: this library, others for the same result, and torch's dot product.

Each is a function of query, key (batch, L, E) and value (batch, S, Ev); all but the dot product compute
softmax(1 / (EPS + distance)) @ value.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchlib.peers import EPS, OURS, Unavailable, cdist_parts, import_ours, with_inductor
from benchlib.verify import WrongResult

DOT, DOT_CUDNN = "dot product", "dot product by cuDNN"
CHECKED_ROWS = 16  # of the first head

Function = Callable[[Any, Any, Any], Any]


def naive(query: Any, key: Any, value: Any) -> Any:
    """The formula by broadcasting, for torch.compile."""
    distance = (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1)
    return torch.softmax(1.0 / (EPS + distance), -1) @ value


def cdist(query: Any, key: Any, value: Any) -> Any:
    """A few heads at a time, which is all that torch.cdist can do on a GPU."""
    parts = cdist_parts(query, key, value)
    return torch.cat([torch.softmax(1.0 / (EPS + torch.cdist(q, k, p=1.0)), -1) @ v for q, k, v in parts])


def keops() -> Function:
    """KeOps' own fused softmax and weighted sum."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import pykeops
            from pykeops.torch import LazyTensor
    except Exception as error:
        raise Unavailable(f"KeOps: {error}; pip install 'l1attn_cupy[bench]', it needs a C++ compiler") from error
    pykeops.set_verbose(False)

    def function(query: Any, key: Any, value: Any) -> Any:
        lazy_q, lazy_k = LazyTensor(query[..., :, None, :]), LazyTensor(key[..., None, :, :])
        scores = 1.0 / ((lazy_q - lazy_k).abs().sum(-1) + EPS)
        return scores.sumsoftmaxweight(LazyTensor(value[..., None, :, :]), dim=query.ndim - 1)

    return function


def dot_product(*backends: Any) -> Function:
    """torch's own attention; heads in a dimension of their own, as its fused kernels take nothing else.

    It chooses among its kernels by itself, or among ``backends``.
    """

    def function(query: Any, key: Any, value: Any) -> Any:
        chosen = sdpa_kernel(list(backends)) if backends else contextlib.nullcontext()
        with chosen:
            return torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None])[0]

    return function


def cudnn_dot_product() -> Function:
    """torch's attention by cuDNN, which takes 16-bit inputs only."""
    return dot_product(SDPBackend.CUDNN_ATTENTION)


def makers(device: str, peers: Collection[str], dynamic: bool = False) -> dict[str, Callable[[], Function]]:
    """The contenders among ``peers``; the dot product is not one of them, but what L1 costs is told by it.

    ``dynamic``: one compilation serves all lengths.
    """
    found: dict[str, Callable[[], Function]] = {
        OURS: ours,
        "cdist": lambda: cdist,
        "compile": lambda: with_inductor(naive, device, dynamic),
        "keops": keops,
    }
    return {name: make for name, make in found.items() if name in peers} | {DOT: dot_product}


def ours() -> Function:
    """This library's."""
    l1 = import_ours()
    return lambda q, k, v: l1.l1_attention(q, k, v, eps=EPS)


def inputs(shape: tuple[int, int, int, int], device: str) -> list[Any]:
    """Query, key, value and a gradient of the result, normal."""
    batch, length_q, length_k, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, length, channels, generator=generator, device=device)
        for length in (length_q, length_k, length_k, length_q)
    ]


def formula(name: str, query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """(scores, result) of the contender ``name`` by its formula, in the arrays' dtype."""
    if name.startswith(DOT):
        scores = query @ key.mT * query.shape[-1] ** -0.5
    else:
        scores = 1.0 / (EPS + torch.cdist(query, key, p=1.0))
    return scores, torch.softmax(scores, -1) @ value


def check(name: str, function: Function, query: Any, key: Any, value: Any) -> None:
    """Raise WrongResult unless some rows of the first head are those of the formula in float64."""
    q, k, v = query[0, :CHECKED_ROWS].double(), key[0].double(), value[0].double()
    scores, expected = formula(name, q, k, v)
    size = torch.softmax(scores, -1) @ v.abs()
    error = ((function(query, key, value)[0, :CHECKED_ROWS] - expected).abs() / size).max().item()
    # A sum of E channels, F, the exponent of a score of this size, and a sum of S weights; 16 of what is rounded once.
    eps = torch.finfo(torch.float32).eps
    bound = 2 * eps * ((query.shape[-1] + 4) * scores.abs().max().item() + key.shape[-2])
    bound += 32 * torch.finfo(query.dtype).eps
    if not error <= bound:
        raise WrongResult(f"off by {error:.1e}, bound {bound:.1e}")


def check_gradients(name: str, function: Function, arrays: list[Any]) -> None:
    """Raise WrongResult unless the first head's gradients are those of the formula in float64.

    They may be off by eight times what the formula itself is in float32, and 16 roundings of the arrays' dtype.
    """
    first = [x[:1] for x in arrays]
    exact = gradients(lambda *given: formula(name, *given)[1], [x.double() for x in first])
    plain = gradients(lambda *given: formula(name, *given)[1], [x.float() for x in first])
    found = [x[:1] for x in gradients(function, arrays)]
    for what, one, two, three in zip(("dquery", "dkey", "dvalue"), found, plain, exact, strict=True):
        size = three.abs().max()
        error, own = (((x - three).abs().max() / size).item() for x in (one, two))
        bound = 8 * own + 16 * torch.finfo(one.dtype).eps
        if not error <= bound:
            raise WrongResult(f"{what} off by {error:.1e} of the largest, bound {bound:.1e}")


def gradients(function: Function, arrays: list[Any]) -> Any:
    """Of query, key and value, where ``arrays`` are these and the gradient of the result."""
    *given, grad = arrays
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(function(*leaves), leaves, grad)
