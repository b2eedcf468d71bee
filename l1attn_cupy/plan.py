"""Every check and every error message; the result is a frozen `Plan` that backends follow without a second look.

Nothing here touches array data or imports an array library: arrays come as `ArraySpec`, read off by `arrays.describe`.
Plans are named tuples, cheap to make and to hash, since every call looks its plan up in a cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple, NoReturn

from .functions import SCORES

DTYPES = ("float16", "bfloat16", "float32", "float64")
QUANTIZED = ("int8", "uint8")
ITEMSIZE = {"bool": 1, "int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
BACKENDS = ("cpu", "cuda", "emulator")

#: Range of the normal float32 numbers.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127

Shape = tuple[int, ...]


class ArraySpec(NamedTuple):
    """What a plan needs to know of an array: strides in elements, ``layout`` "strided" unless sparse or the like."""

    framework: str
    shape: Shape
    strides: Shape
    dtype: str
    device: str
    layout: str = "strided"


class Options(NamedTuple):
    """The keyword options of `l1_scores`, checked."""

    score: str
    scale: float
    eps: float
    backend: str
    variant: str | None


class Plan(NamedTuple):
    """A checked call: ``query (*batch, L, E)`` against ``key (*batch, S, E)``, batch dimensions broadcast.

    ``quant_scale`` is a (*batch, 1, 1) that distances of 8-bit numbers are multiplied by.
    """

    query: ArraySpec
    key: ArraySpec
    batch: Shape
    out_shape: Shape
    options: Options
    quant_scale: ArraySpec | None = None

    @property
    def length_q(self) -> int:
        return self.query.shape[-2]

    @property
    def length_k(self) -> int:
        return self.key.shape[-2]

    @property
    def channels(self) -> int:
        return self.query.shape[-1]

    @property
    def out_dtype(self) -> str:
        return "float32" if self.query.dtype in QUANTIZED else self.query.dtype


def scores(
    query: ArraySpec, key: ArraySpec, score: str, scale: float, eps: float, backend: str | None, variant: str | None
) -> Plan:
    """Check a call of `l1_scores`; the errors are the ones its docstring lists."""
    return cached_scores(query, key, *option_types(score, scale, eps, backend, variant))


def option_types(
    score: str, scale: float, eps: float, backend: str | None, variant: str | None
) -> tuple[str, float, float, str | None, str | None]:
    """Check the types of the options, and that the numbers are positive; their values are checked with the arrays."""
    for name, text in (("score", score), ("backend", backend), ("variant", variant)):
        if not (isinstance(text, str) or (text is None and name != "score")):
            raise TypeError(f"{name} must be a string{'' if name == 'score' else ' or None'}, got {text!r}")
    return score, _positive("scale", scale), _positive("eps", eps), backend, variant


@functools.lru_cache(maxsize=1024)
def cached_scores(
    query: ArraySpec, key: ArraySpec, score: str, scale: float, eps: float, backend: str | None, variant: str | None
) -> Plan:
    """`scores` for options that have passed `option_types`."""
    check_array("query", query)
    check_array("key", key)
    check_same("framework", "come from the same library as query", query, key)
    check_same("dtype", "have query's dtype", query, key)
    check_same("device", "be on query's device", query, key)
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have head_dim {query.shape[-1]} to match query {query.shape}, got {key.shape}")
    check_range(query.dtype, scale, eps)
    options = check_options(score, scale, eps, backend, variant, query.device)
    batch = broadcast_batch(query.shape, key.shape)
    return Plan(query, key, batch, (*batch, query.shape[-2], key.shape[-2]), options)


@functools.lru_cache(maxsize=1024)
def scores_backward(plan: Plan, grad_scores: ArraySpec, saved: ArraySpec | None) -> None:
    """Check what `l1_scores_backward` takes beside the arguments of ``plan``."""
    _check_like_scores(plan, "grad_scores", grad_scores)
    if saved is not None:
        _check_like_scores(plan, "scores", saved)


@functools.lru_cache(maxsize=1024)
def scores_jvp(plan: Plan, tangent_query: ArraySpec, tangent_key: ArraySpec, saved: ArraySpec | None) -> None:
    """Check what the tangent of the scores takes beside the arguments of ``plan``."""
    for name, own, spec in (("query", plan.query, tangent_query), ("key", plan.key, tangent_key)):
        check_array(f"tangent_{name}", spec)
        if spec.shape != own.shape:
            raise ValueError(f"tangent_{name} must have the shape {own.shape} of {name}, got {spec.shape}")
        _check_like_query(plan, f"tangent_{name}", spec)
    if saved is not None:
        _check_like_scores(plan, "scores", saved)


def _check_like_scores(plan: Plan, name: str, spec: ArraySpec) -> None:
    check_array(name, spec, "(..., query length, key length)")
    if spec.shape != plan.out_shape:
        raise ValueError(
            f"{name} must have the shape {plan.out_shape} of the scores of query {plan.query.shape} "
            f"and key {plan.key.shape}, got {spec.shape}"
        )
    _check_like_query(plan, name, spec)


def _check_like_query(plan: Plan, name: str, spec: ArraySpec) -> None:
    check_same("framework", "come from the same library as query", plan.query, spec, name)
    check_same("dtype", "have query's dtype", plan.query, spec, name)
    check_same("device", "be on query's device", plan.query, spec, name)


def operator_in_transform(name: str) -> NoReturn:
    """Raise what torch.func is told of an operator that is called by its name."""
    raise NotImplementedError(
        f"torch.ops.l1attn.{name} must not be differentiated by torch.func: call the functions of l1attn_cupy"
    )


def check_range(dtype: str, scale: float, eps: float) -> None:
    """Raise unless scale and eps are normal numbers of the dtype of accumulation."""
    for name, value in (("scale", scale), ("eps", eps)):
        if not 0 < value < math.inf:  # not seen by `option_types` where an operator is called from a traced graph
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if dtype != "float64" and not _SMALLEST <= value <= _LARGEST:
            raise ValueError(
                f"{name} must be from {_SMALLEST} to {_LARGEST}, as float32 is used for {dtype}, got {value!r}"
            )


def check_dense(name: str, spec: ArraySpec) -> None:
    """Raise unless ``spec`` is a dense array with data."""
    if spec.layout != "strided":
        convert = {"masked": "filled(value)", "nested": "to_padded_tensor(value)"}.get(spec.layout, "to_dense()")
        raise TypeError(f"{name} must be a dense array, got a {spec.layout} one; convert it first with {convert}")
    if spec.device == "meta":
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")


def check_array(
    name: str, spec: ArraySpec, axes: str = "(..., length, head_dim)", dtypes: tuple[str, ...] = DTYPES
) -> None:
    """Raise unless ``spec`` is a dense array of at least two dimensions, with data, of one of ``dtypes``."""
    check_dense(name, spec)
    if spec.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(dtypes)}, got {spec.dtype}")
    check_matrix(name, spec.shape, axes)
    if max(spec.shape) >= 2**31:
        raise ValueError(f"{name} must have dimensions below 2**31, got {spec.shape}")


def check_matrix(name: str, shape: Shape, axes: str = "(..., length, head_dim)") -> None:
    """Raise unless there are at least two dimensions."""
    if len(shape) < 2:
        raise ValueError(f"{name} must have at least 2 dimensions {axes}, got {shape}")


def check_options(
    score: str, scale: float, eps: float, backend: str | None, variant: str | None, device: str
) -> Options:
    """Check the options that all functions share, and settle the backend for arrays on ``device``."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {_quoted(SCORES)}, got {score!r}")
    chosen = _backend(backend, device)
    if chosen == "cpu" and variant is not None:
        raise ValueError(f"variant must be None on the cpu backend, which has one kernel for each op, got {variant!r}")
    return Options(score, scale, eps, chosen, variant)


def check_not_bool(name: str, value: object) -> None:
    """Raise for a bool, which an operator would take as a number."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a positive finite number, got bool {value!r}")


def _positive(name: str, value: float) -> float:
    if type(value) is float and 0 < value < math.inf:
        return value
    check_not_bool(name, value)
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a positive finite number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return number


def _backend(backend: str | None, device: str) -> str:
    kind = device.split(":")[0]
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {_quoted(BACKENDS)}, got {backend!r}")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"query must be on the CPU or on a CUDA device, got device {device}")
    chosen = backend or kind
    if (chosen == "cuda") != (kind == "cuda"):
        raise ValueError(
            f"backend {chosen!r} takes arrays on {'a CUDA device' if chosen == 'cuda' else 'the CPU'}, "
            f"got query on {device}"
        )
    return chosen


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def check_same(field: str, requirement: str, query: ArraySpec, other: ArraySpec, name: str = "key") -> None:
    wanted, got = getattr(query, field), getattr(other, field)
    if wanted != got:
        error = TypeError if field in ("dtype", "framework") else ValueError
        raise error(f"{name} must {requirement} ({wanted}), got {got}")


def broadcast_batch(query: Shape, key: Shape) -> Shape:
    """The batch dimensions of the two shapes broadcast, as in `torch.matmul`."""
    try:
        return broadcast_shapes(query[:-2], key[:-2])
    except ValueError:
        raise ValueError(
            f"key must have batch dimensions that broadcast with {query[:-2]} to match query {query}, got {key}"
        ) from None


def broadcast_shapes(a: Shape, b: Shape) -> Shape:
    """The shape to which both broadcast; ValueError if there is none."""
    n = max(len(a), len(b))
    pairs = list(zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True))
    if any(x != y and 1 not in (x, y) for x, y in pairs):
        raise ValueError(f"{a} and {b} do not broadcast")
    return tuple(y if x == 1 else x for x, y in pairs)


def contiguous(like: ArraySpec, shape: Shape) -> ArraySpec:
    """A C-contiguous array of ``shape``, otherwise like ``like``."""
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return like._replace(shape=shape, strides=strides)


def batch_strides(spec: ArraySpec, batch: Shape) -> Shape:
    """Strides of ``spec`` over the dimensions of ``batch``; 0 where it is broadcast."""
    shape, strides = spec.shape[:-2], spec.strides[:-2]
    missing = len(batch) - len(shape)
    kept = (0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    return (0,) * missing + tuple(kept)


def broadcast_dims(spec: ArraySpec, batch: Shape) -> tuple[bool, ...]:
    """For each dimension of ``batch``, whether all its entries share one matrix of ``spec``."""
    missing = len(batch) - (len(spec.shape) - 2)
    shape = (1,) * missing + spec.shape[:-2]
    return tuple(own == 1 and n != 1 for own, n in zip(shape, batch, strict=True))


def collapse(shape: Shape, strides: list[Shape]) -> tuple[Shape, list[Shape]]:
    """The same batch with as few dimensions as all the given strides allow (at least one)."""
    sizes: list[int] = []
    rows: list[list[int]] = [[] for _ in strides]
    for dim, n in enumerate(shape):
        if n == 1:
            continue
        here = [s[dim] for s in strides]
        if sizes and all(row[-1] == stride * n for row, stride in zip(rows, here, strict=True)):
            sizes[-1] *= n
            for row, stride in zip(rows, here, strict=True):
                row[-1] = stride
        else:
            sizes.append(n)
            for row, stride in zip(rows, here, strict=True):
                row.append(stride)
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return tuple(sizes), [tuple(row) for row in rows]
