"""What a launch of attention consists of, as in `launch`, whose structs these extend."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np

from ..functions import SCORES
from ..plan import ArraySpec, batch_strides, broadcast_dims, collapse, contiguous
from ..plan_attention import UNLIMITED, AttentionPlan
from . import registry
from .launch import _MATRIX, _NUMBER, MAX_BATCH_DIMS, Launch, _launch, _number, _offset, _pick, _tiles
from .registry import Variant

NO_MASK, BOOLEAN, ADDITIVE = range(3)
_MOST = 2**31 - 1

#: Splits of the keys give a call at most SPLIT_BLOCKS blocks, as the variant's line says, and blocks at least so many
#: keys. They depend on sizes alone, so that every device comes to the same bits.
SPLIT_KEYS = 128
_SHARES = 8

_ATTENTION = np.dtype(
    [
        *((name, _MATRIX) for name in ("query", "key", "value", "mask", "softmax")),
        ("mask_column", "i8"),
        ("batch_shape", "i4", MAX_BATCH_DIMS),
        *((name, "i4") for name in ("length_q", "length_k", "channels", "channels_v", "score", "mask_kind")),
        *((name, "i4") for name in ("left", "right")),
        *((name, _NUMBER) for name in ("scale", "eps")),
    ],
    align=True,
)
_FORWARD = np.dtype(
    [
        ("a", _ATTENTION),
        ("out", _MATRIX),
        *((name, "i8") for name in ("out_split", "softmax_split")),
        *((name, "i4") for name in ("unrounded", "splits")),
        ("quant_scale", _MATRIX),
    ],
    align=True,
)
_MERGE = np.dtype(
    [
        ("parts", _FORWARD),
        *((name, _MATRIX) for name in ("out", "softmax")),
        *((name, "i4") for name in ("unrounded", "shares")),
    ],
    align=True,
)
_SAVED = np.dtype(
    [
        ("a", _ATTENTION),
        *((name, _MATRIX) for name in ("grad_out", "delta")),
        *((name, "i4") for name in ("kept", "summed")),
    ],
    align=True,
)
_BACKWARD = np.dtype(
    [("s", _SAVED), ("dx", _MATRIX), ("dxv", _MATRIX), *((name, "i4") for name in ("of_key", "unused"))], align=True
)
_MASK_GRADIENT = np.dtype(
    [
        ("s", _SAVED),
        ("dmask", _MATRIX),
        ("dmask_column", "i8"),
        *((name, "i4") for name in ("one_row", "one_column")),
    ],
    align=True,
)
_SHARED = ("query", "key", "value", "mask", "softmax")
_GIVEN = ("grad_out", "delta")


def attention_forward(plan: AttentionPlan, specs: Mapping[str, ArraySpec]) -> Launch:
    """The launch that computes out, in its own dtype, and softmax, from query, key, value, mask and quant_scale.

    Query and key may be of bytes; all else is float32 then. If `splits` is not 1, out and softmax are those of `parts`,
    for `attention_merge`.
    """
    return _forward(registry.generation("attention_"), plan, tuple(specs.items()))


def splits(plan: AttentionPlan) -> int:
    """How many blocks share the keys of a tile of queries: more than one where there are few tiles."""
    return _splits(registry.generation("attention_"), plan)


def parts(plan: AttentionPlan) -> dict[str, ArraySpec]:
    """out and softmax of one split, as kernels see them; all splits follow on each other in memory."""
    shapes = {"out": plan.channels_v, "softmax": 2}
    like = plan.query._replace(dtype=plan.lse_dtype)
    return {name: contiguous(like, (*plan.batch, plan.length_q, columns)) for name, columns in shapes.items()}


def attention_merge(plan: AttentionPlan, specs: Mapping[str, ArraySpec]) -> Launch:
    """The launch that computes out and softmax from those of the `parts`, "out_parts" and "softmax_parts"."""
    return _merge(registry.generation("attention_"), plan, tuple(specs.items()))


def attention_backward(plan: AttentionPlan, specs: Mapping[str, ArraySpec], dx: str, dxv: str) -> Launch:
    """The launch that computes dquery, or dkey, dvalue or both: "" is one that is not wanted."""
    return _backward(registry.generation("attention_backward"), plan, tuple(specs.items()), dx, dxv)


def attention_mask_gradient(plan: AttentionPlan, specs: Mapping[str, ArraySpec]) -> Launch:
    """The launch that computes dmask."""
    return _mask_gradient(registry.generation("attention_mask_gradient"), plan, tuple(specs.items()))


@functools.lru_cache(maxsize=1024)
def _forward(_generation: int, plan: AttentionPlan, specs: tuple[tuple[str, ArraySpec], ...]) -> Launch:
    variant = _pick("attention_forward", plan)
    args, known = np.zeros((), _FORWARD), dict(specs)
    own = ("out", "quant_scale") if "quant_scale" in known else ("out",)
    matrices = _shared(known, args["a"]) | {name: (args, name) for name in own}
    _fill_batch(args["a"], plan, known, matrices, range(len(plan.batch)))
    _fill_attention(args["a"], plan, known)
    args["unrounded"] = known["out"].dtype != plan.value.dtype
    count = _splits(_generation, plan)
    args["splits"] = count
    if count > 1:
        _fill_parts(args, plan)
    places = {**_offsets(_FORWARD, "a", _SHARED), **{name: _offset(_FORWARD, name) for name in own}}
    return _launch(variant, plan, args, _blocks(plan, variant) * count, places.items())


def _blocks(plan: AttentionPlan, variant: Variant) -> int:
    """Blocks of the forward pass without splits."""
    tiles = _tiles(plan.length_q, variant, "BLOCK_Q") * max(1, _tiles(plan.channels_v, variant, "BLOCK_V"))
    return math.prod(plan.batch) * tiles


@functools.lru_cache(maxsize=1024)
def _splits(_generation: int, plan: AttentionPlan) -> int:
    variant = _pick("attention_forward", plan)
    left, right = plan.window
    keys = (
        plan.length_k if UNLIMITED in plan.window else min(plan.length_k, left + variant.parameters["BLOCK_Q"] + right)
    )
    most = variant.parameters.get("SPLIT_BLOCKS", 1)
    if (left == UNLIMITED) != (right == UNLIMITED):  # causal: of unequal tiles more are needed for a balance
        most *= 2
    return max(1, min(most // _blocks(plan, variant), -(-keys // SPLIT_KEYS)))


def _fill_parts(args: np.ndarray, plan: AttentionPlan) -> None:
    """That out and softmax are the parts: unrounded, one split after the other."""
    args["unrounded"] = True
    for name, spec in parts(plan).items():
        args[f"{name}_split"] = math.prod(spec.shape)


@functools.lru_cache(maxsize=1024)
def _merge(_generation: int, plan: AttentionPlan, specs: tuple[tuple[str, ArraySpec], ...]) -> Launch:
    count = _splits(_generation, plan)
    # The variant that was asked for is one of the forward pass, which has added the mask.
    like_value = plan.query._replace(dtype=plan.value.dtype)
    plan = plan._replace(query=like_value, mask=None, options=plan.options._replace(variant=None))
    variant = _pick("attention_merge", plan)
    args, known = np.zeros((), _MERGE), dict(specs)
    given = {"out_parts": (args["parts"], "out"), "softmax_parts": (args["parts"]["a"], "softmax")}
    written = {name: (args, name) for name in ("out", "softmax")}
    _fill_batch(args["parts"]["a"], plan, known, {**given, **written}, range(len(plan.batch)))
    _fill_attention(args["parts"]["a"], plan, known)
    args["parts"]["splits"] = count
    _fill_parts(args["parts"], plan)
    args["unrounded"] = known["out"].dtype != plan.query.dtype
    args["shares"] = _SHARES if count > 2 * _SHARES else 1
    warps = math.prod(plan.batch) * plan.length_q * max(1, _tiles(plan.channels_v, variant, "BLOCK_V"))
    blocks = -(-warps * int(args["shares"]) * 32 // variant.parameters["THREADS"])
    inner = _offset(_FORWARD, "a") + _offset(_ATTENTION, "softmax")
    places = {
        "out_parts": _offset(_FORWARD, "out"),
        "softmax_parts": inner,
        **{name: _offset(_MERGE, name) for name in written},
    }
    return _launch(variant, plan, args, blocks, places.items())


@functools.lru_cache(maxsize=1024)
def _backward(
    _generation: int, plan: AttentionPlan, specs: tuple[tuple[str, ArraySpec], ...], dx: str, dxv: str
) -> Launch:
    variant = _pick("attention_backward", plan)
    args, known = np.zeros((), _BACKWARD), dict(specs)
    owner = plan.query if dx == "dquery" else plan.key if dx else plan.value
    own = {name: field for field, name in (("dx", dx), ("dxv", dxv)) if name in known}
    kept = _fill_saved(args, plan, known, owner, own)
    args["of_key"] = dx != "dquery"
    blocks_e = _tiles(plan.channels, variant, "BLOCK_E")
    blocks_v = _tiles(plan.channels_v, variant, "BLOCK_E") if args["of_key"] else 0
    tiles = _tiles(owner.shape[-2], variant, "BLOCK_X") * (blocks_e + blocks_v)
    return _launch(variant, plan, args, kept * tiles, _saved_places(_BACKWARD, own))


@functools.lru_cache(maxsize=1024)
def _mask_gradient(_generation: int, plan: AttentionPlan, specs: tuple[tuple[str, ArraySpec], ...]) -> Launch:
    names = {variant.name for variant in registry.variants("attention_mask_gradient")}
    if plan.options.variant not in names:  # it is one of the other gradients alone
        plan = plan._replace(options=plan.options._replace(variant=None))
    variant = _pick("attention_mask_gradient", plan)
    args, known = np.zeros((), _MASK_GRADIENT), dict(specs)
    dmask = known["dmask"]
    kept = _fill_saved(args, plan, known, dmask, {"dmask": "dmask"})
    rows, columns = dmask.shape[-2:]
    args["dmask_column"] = dmask.strides[-1]
    args["one_row"], args["one_column"] = rows < plan.length_q, columns < plan.length_k
    tiles = _tiles(rows, variant, "BLOCK_Q") * _tiles(columns, variant, "BLOCK_K")
    return _launch(variant, plan, args, kept * tiles, _saved_places(_MASK_GRADIENT, {"dmask": "dmask"}))


def _fill_saved(
    args: np.ndarray,
    plan: AttentionPlan,
    specs: Mapping[str, ArraySpec],
    owner: ArraySpec,
    own: Mapping[str, str],
) -> int:
    """All but the addresses, for gradients like ``owner`` in the fields ``own``; returns how many matrices they are."""
    saved = args["s"]
    matrices = _shared(specs, saved["a"]) | {name: (saved, name) for name in _GIVEN if name in specs}
    matrices |= {name: (args, field) for name, field in own.items()}
    shared = broadcast_dims(owner, plan.batch)
    _fill_batch(saved["a"], plan, specs, matrices, sorted(range(len(shared)), key=lambda dim: shared[dim]))
    _fill_attention(saved["a"], plan, specs)
    saved["summed"] = math.prod(n for n, sum_over in zip(plan.batch, shared, strict=True) if sum_over)
    saved["kept"] = math.prod(plan.batch) // int(saved["summed"])
    return int(saved["kept"])


def _shared(specs: Mapping[str, ArraySpec], args: np.ndarray) -> dict[str, tuple[np.ndarray, str]]:
    """Where the arrays of struct Attention go."""
    return {name: (args, name) for name in _SHARED if name in specs}


def _fill_batch(
    attention: np.ndarray,
    plan: AttentionPlan,
    specs: Mapping[str, ArraySpec],
    matrices: Mapping[str, tuple[np.ndarray, str]],
    order: Iterable[int],
) -> None:
    """Batch shape and the strides of all matrices, with the batch dimensions in ``order``."""
    order = list(order)
    strides = [batch_strides(specs[name], plan.batch) for name in matrices]
    shape, strides = collapse(
        tuple(plan.batch[dim] for dim in order), [tuple(s[dim] for dim in order) for s in strides]
    )
    if len(shape) > MAX_BATCH_DIMS:
        raise ValueError(
            "query, key, value and attn_mask must have batch dimensions whose strides merge into at most "
            f"{MAX_BATCH_DIMS}, got batch {plan.batch}; call contiguous() first"
        )
    missing = MAX_BATCH_DIMS - len(shape)
    attention["batch_shape"] = (1,) * missing + shape
    for (name, (target, field)), stride in zip(matrices.items(), strides, strict=True):
        target[field] = (0, (0,) * missing + stride, specs[name].strides[-2])


def _fill_attention(attention: np.ndarray, plan: AttentionPlan, specs: Mapping[str, ArraySpec]) -> None:
    """Sizes and options."""
    attention["length_q"], attention["length_k"] = plan.length_q, plan.length_k
    attention["channels"], attention["channels_v"] = plan.channels, plan.channels_v
    attention["score"] = SCORES[plan.options.score]
    attention["scale"], attention["eps"] = _number(plan.options.scale), _number(plan.options.eps)
    attention["left"], attention["right"] = (min(n, _MOST) for n in plan.window)
    if plan.mask is not None:
        attention["mask_kind"] = BOOLEAN if plan.mask.dtype == "bool" else ADDITIVE
        attention["mask_column"] = specs["mask"].strides[-1]


def _offsets(struct_type: np.dtype, field: str, names: Iterable[str]) -> dict[str, int]:
    """Bytes before each of ``names`` in the struct that ``field`` is."""
    inner = cast(Mapping, struct_type.fields)[field]
    return {name: inner[1] + _offset(inner[0], name) for name in names}


def _saved_places(struct_type: np.dtype, own: Mapping[str, str]) -> list[tuple[str, int]]:
    """Where the address of each array goes, in a struct that starts with AttentionSaved."""
    places = _offsets(struct_type, "s", _GIVEN) | _offsets(_SAVED, "a", _SHARED)
    return [*places.items(), *((name, _offset(struct_type, field)) for name, field in own.items())]
