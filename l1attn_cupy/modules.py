"""Modules for torch; `l1attn_cupy` offers them by their names, and imports torch when it is asked for one."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional

from . import composition, plan_attention, plan_modules
from .attention import l1_attention
from .plan import ArraySpec


class L1MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with L1 attention: the same arguments, parameters, ``state_dict`` and results.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`.
    score, eps
        As in `l1_attention`.
    scale : float, optional
        What distances are multiplied by; ``head_dim ** -0.5`` by default.

    Raises
    ------
    TypeError, ValueError
        An option or, in a call, a tensor does not fit.

    Notes
    -----
    Fused attention in linear memory needs ``need_weights=False`` in the call (True is torch's default), and no dropout
    or ``eval()``. Otherwise the weights are made, in memory that grows with L * S.

    In ``attn_mask`` and ``key_padding_mask`` True is for what may not be attended to, as in torch. A query that may
    attend to no key gives the bias of ``out_proj``, where torch gives NaN. A mask that is added may be float32 whatever
    the dtype of the weights, also with ``need_weights``; it is rounded to theirs, and what is finite stays so.
    ``is_causal`` need not come with an ``attn_mask``; where it comes with one, that mask is what counts. Torch's fast
    path, which is a dot product, is never taken, also not by `torch.nn.TransformerEncoderLayer`. `torch.jit.trace`
    takes the module, `torch.jit.script` does not.

    Examples
    --------
    >>> import torch
    >>> attention = L1MultiheadAttention(12, 3, batch_first=True)
    >>> x = torch.randn(2, 5, 12)
    >>> out, weights = attention(x, x, x)
    >>> out.shape, weights.shape
    (torch.Size([2, 5, 12]), torch.Size([2, 5, 5]))

    In torch's encoder:

    >>> layer = torch.nn.TransformerEncoderLayer(12, 3, batch_first=True)
    >>> layer.self_attn = L1MultiheadAttention(12, 3, dropout=0.1, batch_first=True)
    >>> layer(x).shape
    torch.Size([2, 5, 12])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        score: str = "inverse",
        scale: float | None = None,
        eps: float = 1e-3,
    ) -> None:
        plan_modules.flags(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first)
        made = torch.get_default_dtype() if dtype is None else dtype
        plan_modules.multihead_options(embed_dim, num_heads, dropout, kdim, vdim, made, score, scale, eps)
        kdim, vdim = (None if channels is None else int(channels) for channels in (kdim, vdim))
        sizes, more = (int(embed_dim), int(num_heads), float(dropout)), (bias, add_bias_kv, add_zero_attn)
        super().__init__(*sizes, *more, kdim, vdim, batch_first, device, dtype)
        self.score, self.eps = score, float(eps)
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)

    def _reset_parameters(self) -> None:
        """Also says to torch's encoder that its fast path is not for this module; `in_proj_weight` tells what is so."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def __prepare_scriptable__(self) -> NoReturn:
        plan_modules.not_scriptable(type(self).__name__)

    def extra_repr(self) -> str:
        """What `print` shows."""
        channels = "" if self.kdim == self.vdim == self.embed_dim else f"kdim={self.kdim}, vdim={self.vdim}, "
        appended = {"add_bias_kv": self.bias_k is not None, "add_zero_attn": self.add_zero_attn}
        flags = {"bias": self.in_proj_bias is not None, **appended, "batch_first": self.batch_first}
        return (
            f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, {channels}"
            f"{', '.join(f'{name}={flag}' for name, flag in flags.items())}, "
            f"score={self.score!r}, scale={self.scale:.4g}, eps={self.eps}"
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`.

        Parameters
        ----------
        query : tensor, shape (L, N, embed_dim)
            In the dtype of the weights; under autocast in any of float16, bfloat16 and float32. With ``batch_first``
            (N, L, embed_dim), and without a batch (L, embed_dim); key and value likewise.
        key : tensor, shape (S, N, kdim)
        value : tensor, shape (S, N, vdim)
        key_padding_mask : tensor, shape (N, S), or (S) without a batch, optional
            bool, True for keys that are not attended to; or in the dtype of the weights or float32, under autocast in
            any floating-point dtype, added to the scores.
        need_weights : bool
            Also return the weights, for which memory grows with L * S.
        attn_mask : tensor, shape (L, S) or (N * num_heads, L, S), optional
            As ``key_padding_mask``.
        average_attn_weights : bool
            Return the mean of the heads' weights.
        is_causal : bool
            Without ``attn_mask``: query i attends to keys j <= i, and to those of ``add_bias_kv`` and
            ``add_zero_attn``.

        Returns
        -------
        out : tensor, shape of ``query``
            In the dtype of the weights, or autocast's.
        weights : tensor, shape (N, L, S) or, not averaged, (N, num_heads, L, S), or None
            Of out's dtype; S counts what is appended to the keys, and N is left out without a batch.

        Raises
        ------
        TypeError, ValueError
            A type, dtype, device, layout or shape does not fit. The message names the argument, what is required and
            what came.
        """
        plan_modules.flags(need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal)
        self._check(query, key, value, attn_mask, key_padding_mask)
        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        more = k.shape[2] - key.shape[1]
        is_causal = is_causal and attn_mask is None
        if is_causal and more:  # what is appended to the keys is there for every query
            attn_mask = torch.ones(q.shape[2], key.shape[1], dtype=torch.bool, device=q.device).triu(1)
            is_causal = False
        mask = _merged(attn_mask, key_padding_mask, self.num_heads, more, q.dtype)
        out, weights = self._attend(q, k, v, mask, need_weights, is_causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
    ) -> None:
        given = {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": attn_mask,
            "key_padding_mask": key_padding_mask,
        }
        for name, x in given.items():
            optional = name.endswith("mask")
            if not isinstance(x, torch.Tensor) and not (optional and x is None):
                plan_modules.not_a_tensor(name, x, optional)
        own = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        autocast = own.device.type != "meta" and torch.is_autocast_enabled(own.device.type)
        specs = {name: spec_of(x) for name, x in given.items() if x is not None}
        plan_modules.multihead_tensors(specs, spec_of(own), autocast)
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        plan_modules.multihead_inputs(*shapes, (self.embed_dim, self.kdim, self.vdim), self.batch_first)
        batched, first = query.dim() == 3, self.batch_first or query.dim() == 2
        sizes = query.shape[0 if first else 1] if batched else 0, self.num_heads
        attn, padding = (None if m is None else tuple(m.shape) for m in (attn_mask, key_padding_mask))
        lengths = (query.shape[-2], key.shape[-2]) if first else (query.shape[0], key.shape[0])
        plan_modules.multihead_masks(attn, padding, (*sizes, *lengths))

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (batch, heads, L, E), and key and value (batch, heads, S and what is appended, E)."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key and key is value and self.in_proj_weight is not None:
            q, k, v = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            q, k, v = (functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, more.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
                for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out and, where they are needed, the weights, after dropout as torch returns them."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights and not dropout:
            out = l1_attention(q, k, v, mask, is_causal=is_causal, scale=self.scale, score=self.score, eps=self.eps)
            return out, None
        options = plan_attention.option_types(False, is_causal, None, self.score, self.scale, self.eps, None, None)
        weights, _, value = composition.softmax(q, k, v, mask, options)
        weights = functional.dropout(weights, dropout)
        out = composition.product(weights, value).to(v.dtype)
        return out, weights.to(v.dtype) if need_weights else None


def spec_of(x: torch.Tensor) -> ArraySpec:
    """What is checked of a tensor; `arrays.describe` has a cache, of which Dynamo warns."""
    dtype, layout = (str(attribute).removeprefix("torch.") for attribute in (x.dtype, x.layout))
    shape, layout = ((), "nested") if x.is_nested else (tuple(x.shape), layout)
    return ArraySpec("torch", shape, (), dtype, str(x.device), layout)


def _merged(
    attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, heads: int, more: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """Both masks as one that `l1_attention` takes; ``more`` keys were appended, which all may attend to."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(1).unsqueeze(1)
    given = [functional.pad(m, (0, more)) if more else m for m in (attn_mask, key_padding_mask) if m is not None]
    if not given:
        return None
    if all(m.dtype is torch.bool for m in given):
        excluded = given[0] | given[-1]
        return ~excluded
    wide = functools.reduce(torch.promote_types, [m.dtype for m in given if m.dtype is not torch.bool], dtype)
    added = [torch.zeros_like(m, dtype=wide).masked_fill(m, -torch.inf) if m.dtype is torch.bool else m for m in given]
    return _rounded(added[0] + added[1] if len(added) == 2 else added[0], dtype)


def _rounded(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In ``dtype``; what is finite stays so, as -inf would rule a key out."""
    limits = torch.finfo(dtype)
    if limits.max >= torch.finfo(mask.dtype).max:
        return mask.to(dtype)
    return torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max)).to(dtype)
