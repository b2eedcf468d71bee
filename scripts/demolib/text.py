"""A character-level language model on the Python documentation that is part of every Python."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Blocks, Size, Training, count_parameters
from .runs import Report

#: Newline, the printable ASCII characters, and one sign for all others.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\ufffd"
HELD_OUT = 0.1  # of the characters, at the end
MEASUREMENTS = 20  # of the held-out text, evenly over a run
TEMPERATURE = 0.7
LONGEST_CONTEXT = 4096  # the held-out text must fill a few windows


@dataclass(frozen=True)
class Setting(Training):
    """One training run."""

    context: int  # characters that the model sees
    sample: int  # characters to write after training


@dataclass
class Result:
    """What a run leaves behind."""

    steps: list[int] = field(default_factory=list)  # at which the held-out text was measured
    bits: list[float] = field(default_factory=list)  # per held-out character
    parameters: int = 0
    sample: str = ""
    seconds: float = 0.0


def encode(text: str) -> Tensor:
    """Characters -> their numbers in `ALPHABET`, int64 (characters,)."""
    other = len(ALPHABET) - 1
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([numbers.get(character, other) for character in text])


def decode(numbers: Tensor) -> str:
    """The opposite of `encode`."""
    return "".join(ALPHABET[number] for number in numbers.tolist())


def load_text() -> str:
    """What `help()` knows of Python's syntax, each paragraph once: topics repeat each other, and a model that has
    read a held-out paragraph elsewhere would only have to remember it."""
    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraph for paragraph in paragraphs.values() if paragraph.strip())


def split(text: str) -> tuple[Tensor, Tensor]:
    """Training and held-out part, encoded; the held-out part is the end of the text."""
    numbers = encode(text)
    boundary = len(numbers) - int(HELD_OUT * len(numbers))
    return numbers[:boundary], numbers[boundary:]


def bits_of_frequencies(train: Tensor, held_out: Tensor) -> float:
    """Bits per held-out character of a model that knows only how often each character occurs."""
    counts = torch.bincount(train, minlength=len(ALPHABET)) + 1.0
    return -(counts / counts.sum()).log2()[held_out].mean().item()


class Writer(nn.Module):
    """Embedded characters and positions, causal blocks, a linear head."""

    def __init__(self, size: Size, attention: str, context: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(len(ALPHABET), size.embed_dim)
        self.position = nn.Parameter(torch.randn(context, size.embed_dim) * 0.02)
        self.blocks = Blocks(size, attention)
        self.head = nn.Sequential(nn.LayerNorm(size.embed_dim), nn.Linear(size.embed_dim, len(ALPHABET)))

    def forward(self, numbers: Tensor) -> Tensor:
        """Characters (B, L), L at most `context` -> logits of the next ones (B, L, alphabet)."""
        tokens = self.embed(numbers) + self.position[: numbers.shape[1]]
        return self.head(self.blocks(tokens, is_causal=True))

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats of windows (B, L + 1): each character from those before it."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_character(model: Writer, text: Tensor) -> float:
    """Mean over all of `text` that fills windows of `context` characters, from those before it in its window."""
    windows = text.unfold(0, model.context + 1, model.context)
    nats = sum(model.loss(part).item() * len(part) for part in windows.split(64))
    return nats / len(windows) / math.log(2)


@torch.no_grad()
def write(model: Writer, prompt: str, characters: int, generator: torch.Generator) -> str:
    """`prompt`, and what the model makes of it."""
    numbers = encode(prompt)
    for _ in range(characters):
        logits = model(numbers[None, -model.context :])[0, -1] / TEMPERATURE
        following = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        numbers = torch.cat([numbers, following])
    return decode(numbers)


def train(setting: Setting, report: Report) -> Result:
    """What training one model leaves behind."""
    return train_model(setting, report)[1]


def train_model(setting: Setting, report: Report) -> tuple[Writer, Result]:
    """Train one model; `setting.seed` alone decides its initial numbers, the batches and the sample."""
    torch.manual_seed(setting.seed)
    text, held_out = split(load_text())
    model = Writer(setting.size, setting.attention, setting.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=setting.lr, total_steps=setting.steps, pct_start=0.1, cycle_momentum=False
    )
    windows = text.unfold(0, setting.context + 1, 1)
    order = torch.Generator().manual_seed(setting.seed)
    result, start = Result(parameters=count_parameters(model)), time.perf_counter()
    for step in range(1, setting.steps + 1):
        loss = model.loss(windows[torch.randint(len(windows), (setting.batch_size,), generator=order)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        if step * MEASUREMENTS // setting.steps > (step - 1) * MEASUREMENTS // setting.steps:
            result.steps.append(step)
            result.bits.append(bits_per_character(model, held_out))
        held = f"  held out {result.bits[-1]:.3f}" if result.bits else ""
        report(step, f"bits {loss.item() / math.log(2):.3f}{held}")
    result.sample = write(model, "The ", setting.sample, order)
    result.seconds = time.perf_counter() - start
    return model, result
