"""A small transformer whose attention is a function with the arguments of `scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

import l1attn_cupy as l1


class Attend(Protocol):
    """Query, key and value (B, H, L, head_dim) -> (B, H, L, head_dim); `attn_mask` is True where a query attends."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, is_causal: bool
    ) -> Tensor: ...


def l1_attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, is_causal: bool, score: str
) -> Tensor:
    """L1 attention with the scale that PyTorch's dot product has by default: head_dim ** -0.5."""
    scale = query.shape[-1] ** -0.5
    return l1.l1_attention(query, key, value, attn_mask, is_causal=is_causal, score=score, scale=scale)


#: The contenders. Their models have the same parameters and start from the same numbers: only this function differs.
ATTENTIONS: dict[str, Attend] = {
    "dot": F.scaled_dot_product_attention,
    "inverse": partial(l1_attend, score="inverse"),
    "negative": partial(l1_attend, score="negative"),
}
#: How tables and pictures call them.
NAMES = {"dot": "dot product", "inverse": 'L1 "inverse"', "negative": 'L1 "negative"'}


@dataclass(frozen=True)
class Size:
    """What the number of parameters depends on."""

    layers: int
    embed_dim: int
    num_heads: int
    layer_norm: bool


@dataclass(frozen=True)
class Training:
    """One training run, as far as the demonstrations have it in common."""

    attention: str
    seed: int
    size: Size
    steps: int
    batch_size: int
    lr: float


class Block(nn.Module):
    """Pre-norm transformer block; where `size` has no LayerNorm, the norms are left out."""

    def __init__(self, size: Size, attention: str) -> None:
        super().__init__()
        width = size.embed_dim
        self.num_heads, self.attend = size.num_heads, ATTENTIONS[attention]
        self.norm_attention = nn.LayerNorm(width) if size.layer_norm else nn.Identity()
        self.norm_mlp = nn.LayerNorm(width) if size.layer_norm else nn.Identity()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> Tensor:
        """Tokens (B, L, embed_dim), mask bool (L, L) or None -> (B, L, embed_dim)."""
        qkv = self.to_qkv(self.norm_attention(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, head_dim)
        mixed = self.attend(query, key, value, attn_mask, is_causal=is_causal)
        tokens = tokens + self.to_out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm_mlp(tokens))


class Blocks(nn.Module):
    """`size.layers` blocks one after another."""

    def __init__(self, size: Size, attention: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size, attention) for _ in range(size.layers))

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        """Tokens (B, L, embed_dim), mask bool (L, L) or None -> (B, L, embed_dim)."""
        for block in self.blocks:
            tokens = block(tokens, attn_mask, is_causal=is_causal)
        return tokens


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
