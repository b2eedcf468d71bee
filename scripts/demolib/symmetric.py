"""The symmetric problem: how far apart are the two tokens that share their symbols?"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Blocks, Size, Training
from .runs import Report

TOKENS, SYMBOLS, SCALES = 16, 10, 4
POSITIONS = 128  # a token's position is one of 0, 1/16, ... 127/16
SOLVED = 0.5  # mean squared error below which the problem counts as solved
SMOOTHING = 0.99  # share of the past in the running mean of the loss, as in the original


@dataclass(frozen=True)
class Setting(Training):
    """One training run."""


@dataclass
class Result:
    """What a run leaves behind; `loss` has the running mean after each step."""

    loss: list[float] = field(default_factory=list)
    solved_at: int | None = None  # first step, from 1, at which the running mean is below `SOLVED`
    seconds: float = 0.0


def make_batch(batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random problems and their answers.

    Parameters
    ----------
    batch_size : int
        Number of problems.
    generator : torch.Generator
        Source of all randomness.

    Returns
    -------
    tokens : Tensor
        float32 (batch_size, 16, 14): 10 symbols (normal / 2), which exactly two of the tokens share, then the
        token's position (one of 128, a sixteenth apart) at 4 scales, each a quarter of the one before.
    answer : Tensor
        float32 (batch_size,): the absolute difference of these two tokens' positions at the first scale.
    """
    symbols = torch.randn(batch_size, TOKENS, SYMBOLS, generator=generator) / 2
    first = torch.randint(TOKENS, (batch_size,), generator=generator)
    second = (first + torch.randint(1, TOKENS, (batch_size,), generator=generator)) % TOKENS
    row = torch.arange(batch_size)
    symbols[row, second] = symbols[row, first]
    position = torch.randint(POSITIONS, (batch_size, TOKENS, 1), generator=generator) / 16
    tokens = torch.cat([symbols, *(position / 4**scale for scale in range(SCALES))], dim=-1)
    return tokens, (position[row, first] - position[row, second]).abs().squeeze(-1)


class Measurer(nn.Module):
    """Tokens are embedded each by itself, attend to each other but not to themselves, and add up to one number."""

    def __init__(self, size: Size, attention: str) -> None:
        super().__init__()
        self.embed = nn.Linear(SYMBOLS + SCALES, size.embed_dim)
        self.blocks = Blocks(size, attention)
        self.head = nn.Linear(size.embed_dim, 1)
        self.register_buffer("others", ~torch.eye(TOKENS, dtype=torch.bool))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 16, 14) -> answers (B,)."""
        hidden = self.blocks(F.gelu(self.embed(tokens)), self.others)
        return self.head(hidden).sum(dim=(1, 2))


def train(setting: Setting, report: Report) -> Result:
    """Train one model, every step on problems never seen before; `setting.seed` alone decides them and the start."""
    torch.manual_seed(setting.seed)
    model = Measurer(setting.size, setting.attention)
    problems = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    result, start = Result(), time.perf_counter()
    for step in range(1, setting.steps + 1):
        tokens, answer = make_batch(setting.batch_size, problems)
        loss = F.mse_loss(model(tokens), answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
        optimizer.step()
        past = result.loss[-1] if result.loss else loss.item()
        result.loss.append(SMOOTHING * past + (1 - SMOOTHING) * loss.item())
        if result.solved_at is None and result.loss[-1] < SOLVED:
            result.solved_at = step
        report(step, f"loss {result.loss[-1]:.3f}")
    result.seconds = time.perf_counter() - start
    return result
