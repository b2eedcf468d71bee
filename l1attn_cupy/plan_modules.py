"""Checks of the torch modules, and their error messages; as `plan`, of which it uses the parts."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

from . import plan
from .plan import ArraySpec, Shape
from .plan_attention import check_flag


def flags(**given: Any) -> None:
    """Check that each is a bool."""
    for name, flag in given.items():
        check_flag(name, flag)


def multihead_options(
    embed_dim: int,
    num_heads: int,
    dropout: float,
    kdim: int | None,
    vdim: int | None,
    dtype: Any,
    score: str,
    scale: float | None,
    eps: float,
) -> None:
    """Check the options of `L1MultiheadAttention` but for its flags; ``dtype`` is one of torch."""
    for name, number in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
        if number is None and name in ("kdim", "vdim"):
            continue
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"{name} must be a whole number from 1 on, got {type(number).__name__} {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {number!r}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads {num_heads}, got {embed_dim}")
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(f"dropout must be a number from 0 to 1, got {type(dropout).__name__} {dropout!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
    names = {f"torch.{name}": name for name in plan.DTYPES}
    if repr(dtype) not in names:  # a string shows quotes
        raise TypeError(f"dtype must be {', '.join(names)} or None, got {dtype!r}")
    checked = plan.option_types(score, 1.0 if scale is None else scale, eps, None, None)
    plan.check_range(names[repr(dtype)], *checked[1:3])
    plan.check_options(*checked, "cpu")


def multihead_inputs(query: Shape, key: Shape, value: Shape, channels: tuple[int, int, int], batch_first: bool) -> None:
    """Check the shapes of a call; ``channels`` are embed_dim, kdim and vdim."""
    for name, shape, own in zip(("query", "key", "value"), (query, key, value), channels, strict=True):
        if len(shape) not in (2, 3):
            raise ValueError(f"{name} must have 3 dimensions, or 2 without a batch, got {shape}")
        if len(shape) != len(query):
            raise ValueError(f"{name} must have {len(query)} dimensions to match query {query}, got {shape}")
        if shape[-1] != own:
            raise ValueError(f"{name} must have {own} channels, got {shape}")
    if value[:-1] != key[:-1]:
        axes = "length" if len(key) == 2 else "batch and length" if batch_first else "length and batch"
        raise ValueError(f"value must have the {axes} {key[:-1]} of key, got {value}")
    batch = 0 if batch_first else 1
    if len(query) == 3 and key[batch] != query[batch]:
        raise ValueError(f"key must have a batch of {query[batch]} to match query {query}, got {key}")


def not_a_tensor(name: str, got: Any, optional: bool = False) -> NoReturn:
    """Raise for what is no tensor of torch."""
    kind = f"{type(got).__module__}.{type(got).__qualname__}".removeprefix("builtins.")
    raise TypeError(f"{name} must be a torch tensor{' or None' if optional else ''}, got {kind}")


def multihead_tensors(given: Mapping[str, ArraySpec], weights: ArraySpec, autocast: bool) -> None:
    """Check layouts, dtypes and devices of the tensors of a call; ``weights`` are those of the module."""
    for name, spec in given.items():
        mask = name.endswith("mask")
        if spec.layout == "nested" and not mask:
            multihead_nested()
        plan.check_dense(name, spec)
        plan.check_same("device", "be on the device of the module's weights", weights, spec, name)
        if not mask:
            _check_dtype(name, spec, weights, "the module's weights", autocast)
        elif spec.dtype not in ("bool", *(plan.DTYPES if autocast else ("float32", weights.dtype))):
            floating = "floating-point" if autocast else f"float32 or of the dtype of the weights ({weights.dtype})"
            raise TypeError(
                f"{name} must be bool, True where attention is not allowed, or {floating}, got {spec.dtype}"
            )


def _check_dtype(name: str, spec: ArraySpec, like: ArraySpec, of: str, autocast: bool) -> None:
    """Raise unless the dtype is that of ``like``, or autocast, which leaves float64 alone, makes both the same."""
    if spec.dtype not in plan.DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(plan.DTYPES)}, got {spec.dtype}")
    if not autocast or "float64" in (spec.dtype, like.dtype):
        plan.check_same("dtype", f"have the dtype of {of}", like, spec, name)


def not_scriptable(module: str) -> NoReturn:
    """Raise where `torch.jit.script` asks for a module."""
    raise NotImplementedError(
        f"{module} cannot be compiled by torch.jit.script, which knows but a part of Python; use torch.jit.trace, "
        "torch.compile or torch.export"
    )


def multihead_nested() -> NoReturn:
    """Raise for nested tensors."""
    raise TypeError(
        "query, key and value must be dense tensors, got a nested one; torch.nn.TransformerEncoder makes it of padded "
        "batches: give it enable_nested_tensor=False, replace self_attn before the encoder is built, or, as for the "
        "encoder of torch.nn.Transformer, set its use_nested_tensor to False"
    )


def multihead_masks(attn_mask: Shape | None, key_padding_mask: Shape | None, sizes: tuple[int, int, int, int]) -> None:
    """Check the shapes of the masks; ``sizes`` are batch (0 for none), heads, L and S."""
    batch, heads, length_q, length_k = sizes
    matrices = max(batch, 1) * heads
    for name, shape, shapes in (
        ("attn_mask", attn_mask, [(length_q, length_k), (matrices, length_q, length_k)]),
        ("key_padding_mask", key_padding_mask, [(batch, length_k) if batch else (length_k,)]),
    ):
        if shape is not None and shape not in shapes:
            raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {shape}")


def original(q: ArraySpec, k: ArraySpec, autocast: bool) -> None:
    """Check the tensors of the original library's module, by the names that it has for them."""
    for name, spec in (("q", q), ("k", k)):
        plan.check_dense(name, spec)
        _check_dtype(name, spec, q, "q", autocast)
        if len(spec.shape) != 4:
            raise ValueError(f"{name} must have the shape (batch, ctx, heads, width), got {spec.shape}")
        if spec.shape[-1] == 0:
            raise ValueError(f"{name} must have a width from 1 on, as scores are divided by its root, got {spec.shape}")
    plan.check_same("device", "be on q's device", q, k, "k")
    for dim, what in ((0, "batch"), (2, "heads"), (3, "width")):
        if q.shape[dim] != k.shape[dim]:
            raise ValueError(f"k must have {what} {q.shape[dim]} to match q {q.shape}, got {k.shape}")
