"""Every check of the fused attention and every error message; as `plan`, of which it uses the parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from . import plan
from .plan import ArraySpec, Options, Shape, contiguous

UNLIMITED = -1

#: Arrays that may be None.
OPTIONAL = ("attn_mask", "grad_lse", "quant_scale")

#: What a backward pass takes beside the inputs, and how that is described; grad_lse may be None.
SAVED = ("grad_out", "out", "softmax", "grad_lse")
Saved = tuple[ArraySpec | None, ...]

#: First query, end of the queries, first key and end of the keys of each sequence of a batch, (sequences, 4).
Segments = np.ndarray


class AttentionPlan(NamedTuple):
    """A checked call. Arrays are as kernels see them: all batch dimensions broadcast to ``batch``.

    With ``groups``, heads are two dimensions, heads of key and queries that share one. ``window`` is (left, right),
    `UNLIMITED` or a number of keys each. ``packed`` tells that (total, heads, E) is the order of the arrays in memory,
    and that ``segments`` are the sequences, which may be others in every call: see `without_segments`.
    """

    query: ArraySpec
    key: ArraySpec
    value: ArraySpec
    mask: ArraySpec | None
    batch: Shape
    out_shape: Shape
    groups: tuple[int, int] | None
    window: tuple[int, int]
    packed: bool
    options: Options
    segments: Segments | None = None

    @property
    def without_segments(self) -> AttentionPlan:
        """What to look things up by in a cache."""
        return self._replace(segments=None) if self.packed else self

    @property
    def sequences(self) -> Segments:
        """``segments``, or all as one."""
        return np.array([[0, self.length_q, 0, self.length_k]]) if self.segments is None else self.segments

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
    def channels_v(self) -> int:
        return self.value.shape[-1]

    @property
    def lse_shape(self) -> Shape:
        return self.out_shape[:-1]

    @property
    def softmax_shape(self) -> Shape:
        return (*self.lse_shape, 2)

    @property
    def lse_dtype(self) -> str:
        """That of accumulation."""
        return "float64" if self.query.dtype == "float64" else "float32"

    def new_like(self, spec: ArraySpec) -> ArraySpec:
        """A new array of the shape of ``spec``, as kernels see both: packed ones have heads after lengths in memory."""
        if not self.packed:
            return contiguous(spec, spec.shape)
        *heads, length, channels = spec.shape
        in_memory, *of_heads, last = contiguous(spec, (length, *heads, channels)).strides
        return spec._replace(strides=(*of_heads, in_memory, last))

    def seen_by_kernels(self, name: str, spec: ArraySpec) -> ArraySpec:
        """Any array of a call, by its name: a matrix for each batch entry, with heads as in `groups`."""
        if name in ("mask", "dmask"):
            spec = _as_matrix(spec)
        elif name in ("delta", "grad_lse"):  # a column
            spec = spec._replace(shape=(*spec.shape, 1), strides=(*spec.strides, 0))
        if self.groups is None:
            return spec
        of_key = name in ("key", "value", "dkey", "dvalue", "quant_scale")
        return _lone(spec) if of_key else _split_heads(spec, *self.groups)


class AttentionOptions(NamedTuple):
    """The options of attention of the right types; ``window`` with causality taken in."""

    enable_gqa: bool
    left: int
    right: int
    score: str
    scale: float
    eps: float
    backend: str | None
    variant: str | None


def check_dropout(dropout_p: Any) -> None:
    """Raise unless there is no dropout."""
    if type(dropout_p) is float and dropout_p == 0:
        return
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real) or not 0 <= float(dropout_p) <= 1:
        raise ValueError(f"dropout_p must be a number from 0 to 1, got {dropout_p!r}")
    if float(dropout_p) > 0:
        raise NotImplementedError(
            f"dropout_p must be 0.0, as dropout of attention weights is not built, got {dropout_p!r}; apply "
            "torch.nn.functional.dropout to the result, or to softmax(l1_scores(query, key)) before @ value"
        )


def option_types(
    enable_gqa: Any,
    is_causal: Any,
    window: Any,
    score: str,
    scale: float | None,
    eps: float,
    backend: str | None,
    variant: str | None,
) -> AttentionOptions:
    """Check the types of the options, and that numbers are in their range."""
    check_flag("enable_gqa", enable_gqa)
    check_flag("is_causal", is_causal)
    if scale is None:
        raise TypeError(
            "scale must be a positive finite number, got NoneType None; what scaled_dot_product_attention makes of "
            "None is scale=query.shape[-1] ** -0.5"
        )
    _check_window(window)
    left, right = band(is_causal, window)
    return AttentionOptions(enable_gqa, left, right, *plan.option_types(score, scale, eps, backend, variant))


def check_flag(name: str, flag: Any) -> None:
    """Raise unless ``flag`` is a bool."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {flag!r}")


def band(is_causal: bool, window: Sequence[int] | None) -> tuple[int, int]:
    """How many keys before and after its own place a query may attend to; more than there can be is no limit."""
    left, right = window or (UNLIMITED, UNLIMITED)
    right = 0 if is_causal else right
    return UNLIMITED if left >= 2**30 else int(left), UNLIMITED if right >= 2**30 else int(right)


def _check_window(window: Any) -> None:
    if window is None:
        return
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or (left, right), got {window!r}")
    for number in window:
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"window must have whole numbers (left, right), got {window!r}")
        if number < UNLIMITED:
            raise ValueError(f"window must have numbers from 0 on, or -1 for no limit, got {window!r}")


def attention(
    specs: Sequence[ArraySpec | None], options: AttentionOptions, segments: Segments | None = None
) -> AttentionPlan:
    """Check a call of `l1_attention` with query, key, value and mask; the errors are the ones its docstring lists.

    With ``segments`` the arrays are packed sequences with heads before lengths.
    """
    call = _attention(*specs, options, segments is not None)
    return call if segments is None else call._replace(segments=segments)


@functools.lru_cache(maxsize=64)
def _attention(
    query: ArraySpec,
    key: ArraySpec,
    value: ArraySpec,
    mask: ArraySpec | None,
    options: AttentionOptions,
    packed: bool,
) -> AttentionPlan:
    arrays = {"query": query, "key": key, "value": value}
    for name, spec in arrays.items():
        plan.check_array(name, spec)
        _check_like_query(name, query, spec)
    given = {name: as_given(spec.shape, packed) for name, spec in arrays.items()}
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key must have head_dim {query.shape[-1]} to match query {given['query']}, got {given['key']}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have length {key.shape[-2]} to match key {given['key']}, got {given['value']}")
    plan.check_range(query.dtype, options.scale, options.eps)
    for name, number in (("window_left", options.left), ("window_right", options.right)):
        if number < UNLIMITED:  # not seen by `option_types` where an operator is called by its name
            raise ValueError(f"{name} must be a number from 0 on, or -1 for no limit, got {number}")
    checked = plan.check_options(
        options.score, options.scale, options.eps, options.backend, options.variant, query.device
    )
    groups = _groups(query, key, value, given) if options.enable_gqa else None
    heads = [_split_heads(query, *groups), _lone(key), _lone(value)] if groups else [query, key, value]
    batch = broadcast_batch([spec.shape[:-2] for spec in heads], given, packed, 2 if groups else 0)
    merged = (*batch[:-2], batch[-2] * batch[-1]) if groups else batch
    out_shape = (*merged, query.shape[-2], value.shape[-1])
    if mask is not None:
        _check_mask(mask, query, (*merged, query.shape[-2], key.shape[-2]))
        mask = _as_matrix(mask)
        mask = _split_heads(mask, *groups) if groups else mask
    return AttentionPlan(
        heads[0],
        heads[1],
        heads[2],
        mask,
        batch,
        out_shape,
        groups,
        (options.left, options.right),
        packed,
        checked,
    )


def _check_like_query(name: str, query: ArraySpec, spec: ArraySpec, unrounded: str | None = None) -> None:
    """Raise unless library, dtype and device are those of query, or the dtype is ``unrounded``."""
    plan.check_same("framework", "come from the same library as query", query, spec, name)
    if spec.dtype != unrounded:
        plan.check_same("dtype", "have query's dtype", query, spec, name)
    plan.check_same("device", "be on query's device", query, spec, name)


def as_given(shape: Shape, packed: bool) -> Shape:
    """The shape as it was given: packed arrays come with heads before lengths."""
    return (shape[1], shape[0], *shape[2:]) if packed else shape


def _groups(query: ArraySpec, key: ArraySpec, value: ArraySpec, given: Mapping[str, Shape]) -> tuple[int, int]:
    """Heads of key, and queries that share one."""
    for name, spec in (("query", query), ("key", key), ("value", value)):
        if len(spec.shape) < 3:
            raise ValueError(
                f"{name} must have at least 3 dimensions (..., heads, length, head_dim) with enable_gqa, "
                f"got {spec.shape}"
            )
    heads_q, heads_k = query.shape[-3], key.shape[-3]
    if value.shape[-3] != heads_k:
        raise ValueError(f"value must have {heads_k} heads to match key {given['key']}, got {given['value']}")
    if heads_q % heads_k if heads_k else heads_q:
        raise ValueError(
            f"query must have a multiple of the {heads_k} heads of key {given['key']}, got {given['query']}"
        )
    return heads_k, heads_q // heads_k if heads_k else 1


def _split_heads(spec: ArraySpec, heads: int, group: int) -> ArraySpec:
    """The heads, dimension -3, as ``heads`` times ``group``; one head for all stays one."""
    if len(spec.shape) < 3:
        return spec
    n, stride = spec.shape[-3], spec.strides[-3]
    shape = (1, 1) if n == 1 else (heads, group)
    return spec._replace(
        shape=(*spec.shape[:-3], *shape, *spec.shape[-2:]),
        strides=(*spec.strides[:-3], group * stride, stride, *spec.strides[-2:]),
    )


def _lone(spec: ArraySpec) -> ArraySpec:
    """With a dimension of 1 after the heads, for the queries that share one."""
    return spec._replace(
        shape=(*spec.shape[:-2], 1, *spec.shape[-2:]), strides=(*spec.strides[:-2], 0, *spec.strides[-2:])
    )


def broadcast_batch(batches: Sequence[Shape], given: Mapping[str, Shape], packed: bool, of_heads: int = 0) -> Shape:
    """The batch dimensions of query, key and value broadcast, as in `torch.matmul`; the last ``of_heads`` are heads."""
    batch: Shape = ()
    for own_batch, (name, shape) in zip(batches, given.items(), strict=True):
        try:
            batch = plan.broadcast_shapes(batch, own_batch)
        except ValueError:
            what, own = ("heads", batch[0]) if packed else ("batch dimensions", batch[: len(batch) - of_heads])
            raise ValueError(
                f"{name} must have {what} that broadcast with {own} to match query {given['query']}, got {shape}"
            ) from None
    return batch


def _check_mask(mask: ArraySpec, query: ArraySpec, shape: Shape) -> None:
    """Raise unless the mask fits scores of ``shape``."""
    plan.check_dense("attn_mask", mask)
    if mask.dtype not in ("bool", query.dtype):
        raise TypeError(f"attn_mask must be bool or have query's dtype ({query.dtype}), got {mask.dtype}")
    plan.check_same("framework", "come from the same library as query", query, mask, "attn_mask")
    plan.check_same("device", "be on query's device", query, mask, "attn_mask")
    missing = len(shape) - len(mask.shape)
    own = (1,) * missing + mask.shape
    if missing < 0 or any(n not in (1, wanted) for n, wanted in zip(own, shape, strict=True)):
        raise ValueError(f"attn_mask must broadcast to the shape {shape} of the scores, got {mask.shape}")


def _as_matrix(mask: ArraySpec) -> ArraySpec:
    """The mask with at least two dimensions, and stride 0 where it is broadcast."""
    added = max(0, 2 - len(mask.shape))
    shape, strides = (1,) * added + mask.shape, (0,) * added + mask.strides
    return mask._replace(shape=shape, strides=tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True)))


def check_dmask(mask: ArraySpec | None, wanted: bool, name: str = "return_dmask") -> None:
    """Raise where the gradient of a mask is asked for, by the argument ``name``, that has none."""
    if wanted and (mask is None or mask.dtype == "bool"):
        got = "None" if mask is None else "a bool mask"
        raise ValueError(f"{name} needs an attn_mask that is added to the scores, got {got}")


def check_packed(name: str, spec: ArraySpec) -> None:
    """Raise unless ``spec`` is a dense array of the shape of packed sequences."""
    plan.check_dense(name, spec)
    if len(spec.shape) != 3:
        raise ValueError(f"{name} must have 3 dimensions (total, heads, head_dim), got {spec.shape}")


def check_both_ends(cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    """Raise where only one of the two is given."""
    for name, ends, other in (
        ("cu_seqlens_q", cu_seqlens_q, cu_seqlens_k),
        ("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q),
    ):
        if ends is None and other is not None:
            raise TypeError(f"{name} must be given where the other lengths are, got None")


def segments(cu_seqlens_q: np.ndarray, cu_seqlens_k: np.ndarray, total_q: int, total_k: int) -> Segments:
    """The sequences that cumulative lengths describe."""
    for name, ends, array, total in (
        ("cu_seqlens_q", cu_seqlens_q, "query", total_q),
        ("cu_seqlens_k", cu_seqlens_k, "key", total_k),
    ):
        if not ends.size or ends[0] != 0 or ends[-1] != total or (ends[1:] < ends[:-1]).any():
            raise ValueError(
                f"{name} must rise from 0 to the {total} rows of {array}, got {_shortened(ends)}; "
                "it has the first row of each sequence, and the end of the last"
            )
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k must be of as many sequences as cu_seqlens_q, {len(cu_seqlens_q) - 1}, "
            f"got {len(cu_seqlens_k) - 1}"
        )
    return np.stack([cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:]], -1)


def _shortened(numbers: np.ndarray) -> str:
    return str(numbers.tolist()) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8].tolist()))}, ...]"


@functools.lru_cache(maxsize=64)
def check_saved(
    call: AttentionPlan, grad_out: ArraySpec, out: ArraySpec, softmax: ArraySpec, grad_lse: ArraySpec | None
) -> None:
    """`attention_backward` where softmax is at hand, as the forward of ``call`` made it, and not only lse."""
    plan.check_array("softmax", softmax, "(..., query length, 2)")
    plan.check_same("framework", "come from the same library as query", call.query, softmax, "softmax")
    plan.check_same("device", "be on query's device", call.query, softmax, "softmax")
    if softmax.dtype != call.lse_dtype:
        raise TypeError(f"softmax must have dtype {call.lse_dtype}, got {softmax.dtype}")
    if softmax.shape != call.softmax_shape:
        raise ValueError(f"softmax must have the shape {call.softmax_shape}, got {softmax.shape}")
    attention_backward(call, grad_out, out, None, grad_lse)


@functools.lru_cache(maxsize=64)
def attention_backward(
    call: AttentionPlan, grad_out: ArraySpec, out: ArraySpec, lse: ArraySpec | None, grad_lse: ArraySpec | None
) -> None:
    """Check what `l1_attention_backward` takes beside the arguments of ``call``, which is without segments."""
    query = call.query
    for name, spec in (("grad_out", grad_out), ("out", out)):
        plan.check_array(name, spec)
        _check_like_query(name, query, spec, call.lse_dtype if name == "out" else None)
        if spec.shape != call.out_shape:
            raise ValueError(f"{name} must have the shape {call.out_shape} of the result, got {spec.shape}")
    for name, row in (("lse", lse), ("grad_lse", grad_lse)):
        if row is None:
            continue
        plan.check_dense(name, row)
        if row.dtype not in (call.lse_dtype, "float64"):
            raise TypeError(f"{name} must have dtype {call.lse_dtype} or float64, got {row.dtype}")
        plan.check_same("framework", "come from the same library as query", query, row, name)
        plan.check_same("device", "be on query's device", query, row, name)
        if row.shape != call.lse_shape:
            raise ValueError(f"{name} must have the shape {call.lse_shape}, got {row.shape}")
