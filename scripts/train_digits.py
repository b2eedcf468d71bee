#!/usr/bin/env python3
"""Train a small transformer on handwritten digits, with L1 and with dot-product attention, and compare.

The data are the 1,797 real 8x8 images that come with scikit-learn (`load_digits`; nothing is downloaded).
A quarter of them, drawn class by class, is held out. Both models have the same parameters, start from the
same numbers and see the same batches in the same order; they differ in one line, the attention score:

    L1           softmax_j( F(scale * sum_k |q_ik - k_jk|) )      F from --score
    dot product  softmax_j(   scale * sum_k  q_ik * k_jk   )      scale = head_dim ** -0.5 in both

Prints the accuracy of both on the held-out images and draws one picture: loss, accuracy, and where each
model looks. The exit status is 1 if L1 attention stays under 95 %. Nothing is chosen by the held-out images:
the weights judged are those after the last epoch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

try:
    import matplotlib
    import torch
    from demolib.options import whole
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn
    from torch.nn import functional as F

    import l1attn_cupy as l1
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    sys.exit(f'train_digits.py needs {missing}, not installed here: pip install "l1attn_cupy[demo]"')

matplotlib.use("Agg")  # a picture in a file needs no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import SubFigure
from matplotlib.ticker import PercentFormatter

SIDE = 8  # pixels
PATCH = 4  # a token is a 4x4 window; windows overlap, one starts at every pixel
GRID = SIDE - PATCH + 1  # 5 x 5 windows fit into an image
CLASSES = 10
TARGET = 0.95
COLORS = {"L1": "#d1495b", "dot product": "#30638e"}

Scores = Callable[[Tensor, Tensor], Tensor]  # (B, H, L, E), (B, H, S, E) -> (B, H, L, S)


@dataclass(frozen=True)
class Split:
    """Images float32 (N, 1, 8, 8) in 0..1, labels int64 (N,); training and held-out part."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class History:
    """What one training run leaves behind; one entry per epoch in the lists."""

    loss: list[float] = field(default_factory=list)  # mean cross-entropy over the epoch's batches
    accuracy: list[float] = field(default_factory=list)  # on the held-out images, 0..1
    seconds: float = 0.0
    parameters: int = 0


def l1_attention_scores(query: Tensor, key: Tensor, score: str) -> Tensor:
    """L1 scores (B, H, L, S); the scale keeps the summed distance in proportion to the head's size."""
    return l1.l1_scores(query, key, score=score, scale=query.shape[-1] ** -0.5)


def dot_product_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled dot products (B, H, L, S)."""
    return query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5


class Block(nn.Module):
    """Pre-norm transformer block whose attention scores come from `scores`."""

    def __init__(self, embed_dim: int, num_heads: int, scores: Scores) -> None:
        super().__init__()
        self.num_heads, self.scores = num_heads, scores
        self.norm_attention, self.norm_mlp = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.to_qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.to_out = nn.Linear(embed_dim, embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, embed_dim) -> the same, and the attention weights (B, H, L, L)."""
        qkv = self.to_qkv(self.norm_attention(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, head_dim)
        weights = self.scores(query, key).softmax(dim=-1)
        tokens = tokens + self.to_out((weights @ value).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm_mlp(tokens)), weights


class Classifier(nn.Module):
    """One token for each window of the image and a class token that reads them, blocks, a linear head."""

    def __init__(self, embed_dim: int, num_heads: int, num_layers: int, scores: Scores) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, embed_dim)
        self.class_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, GRID * GRID, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, scores) for _ in range(num_layers))
        self.head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (B, 1, 8, 8) -> logits (B, 10), and each block's attention weights (B, H, 26, 26)."""
        windows = F.unfold(images, PATCH).transpose(1, 2)  # (B, 25, 16)
        windows = self.embed(windows) + self.position
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), windows], dim=1)
        maps = []
        for block in self.blocks:
            tokens, weights = block(tokens)
            maps.append(weights)
        return self.head(tokens[:, 0]), maps


def load_split(seed: int) -> Split:
    """Three quarters of the images for training, one quarter held out, with equal shares of every digit."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0  # stored as 0..16
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    return Split(images[train], labels[train], images[test], labels[test])


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images (0..1) whose highest logit is the label's."""
    return (model(images)[0].argmax(dim=-1) == labels).float().mean().item()


def train(
    scores: Scores, split: Split, args: argparse.Namespace, on_epoch: Callable[[History], None]
) -> tuple[Classifier, History]:
    """Train one classifier from `args.seed`: initial numbers and order of batches depend on nothing else."""
    torch.manual_seed(args.seed)
    model = Classifier(args.width, args.heads, args.layers, scores)
    order = torch.Generator().manual_seed(args.seed)
    steps = -(-len(split.train_labels) // args.batch_size)  # batches in an epoch, rounded up
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.epochs * steps, cycle_momentum=False
    )
    history = History(parameters=sum(p.numel() for p in model.parameters()))
    start = time.perf_counter()
    for _ in range(args.epochs):
        total = 0.0
        for batch in torch.randperm(len(split.train_labels), generator=order).split(args.batch_size):
            loss = F.cross_entropy(model(split.train_images[batch])[0], split.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        history.loss.append(total / len(split.train_labels))
        history.accuracy.append(accuracy(model, split.test_images, split.test_labels))
        history.seconds = time.perf_counter() - start
        on_epoch(history)
    return model, history


def train_all(
    contenders: dict[str, Scores], split: Split, args: argparse.Namespace, console: Console
) -> dict[str, tuple[Classifier, History]]:
    """Train every contender in turn, each under its own progress bar."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("epoch {task.completed:>3}/{task.total}  {task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    runs = {}
    with Progress(*columns, console=console) as progress:
        for name, scores in contenders.items():
            task = progress.add_task(name, total=args.epochs, state="")

            def report(history: History, task: TaskID = task) -> None:
                state = f"loss {history.loss[-1]:.4f}  test {history.accuracy[-1]:.1%}"
                progress.update(task, advance=1, state=state)

            runs[name] = train(scores, split, args, report)
    return runs


@torch.no_grad()
def class_token_maps(model: Classifier, images: Tensor) -> Tensor:
    """Where the class token looks, in multiples of an even share: (N, 5, 5).

    Taken from the first block, where a token is one window of the image and nothing else; mean over heads.
    """
    weights = model(images)[1][0].mean(dim=1)  # (N, 26, 26)
    looks = weights[:, 0, 1:]  # from the class token, to each window
    return (looks / looks.mean(dim=-1, keepdim=True)).unflatten(-1, (GRID, GRID))


def draw_curves(axes: Sequence[Axes], histories: dict[str, History]) -> None:
    """Training loss on the left axes, held-out accuracy on the right ones."""
    for name, history in histories.items():
        epochs = range(1, len(history.loss) + 1)
        label = f"{name}: {history.accuracy[-1]:.1%}"
        axes[0].semilogy(epochs, history.loss, color=COLORS[name], linewidth=2, label=name)
        axes[1].plot(epochs, history.accuracy, color=COLORS[name], linewidth=2, label=label)
    axes[0].set_title("Training loss (cross-entropy)", loc="left")
    axes[1].set_title("Accuracy on held-out images", loc="left")
    axes[1].axhline(TARGET, color="0.6", linewidth=1, linestyle=":")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)


def draw_digits(row: Sequence[Axes], images: Tensor, darkest: float) -> None:
    """One image on each axes, in greys from white to `darkest` (0..1)."""
    for ax, image in zip(row, images, strict=True):
        ax.imshow(image[0], cmap="gray_r", vmin=0.0, vmax=1.0 / darkest, extent=(0, SIDE, SIDE, 0))
        ax.set(xticks=[], yticks=[])


def draw_maps(figure: SubFigure, images: Tensor, labels: Tensor, maps: dict[str, Tensor]) -> None:
    """A row of digits, then a row for each contender with its maps laid over the same digits.

    Each map cell lies on the middle of its window. Each row has a scale of its own, from the even share up.
    """
    grid = figure.subplots(1 + len(maps), len(images), squeeze=False)
    draw_digits(grid[0], images, darkest=1.0)
    grid[0][0].set_ylabel("held-out image")
    for ax, label in zip(grid[0], labels.tolist(), strict=True):
        ax.set_title(label, color="0.4")
    inset = (PATCH - 1) / 2  # pixels from the border of the image to the first cell
    for row, (name, looks) in zip(grid[1:], maps.items(), strict=True):
        draw_digits(row, images, darkest=0.3)
        row[0].set_ylabel(name, color=COLORS[name])
        tint = LinearSegmentedColormap.from_list(name, [to_rgba(COLORS[name], alpha) for alpha in (0.0, 1.0)])
        scale = Normalize(1.0, looks.max().item())
        for ax, look in zip(row, looks, strict=True):
            ax.imshow(look, cmap=tint, norm=scale, extent=(inset, SIDE - inset, SIDE - inset, inset))
            ax.set(xlim=(0, SIDE), ylim=(SIDE, 0))
        handle = ScalarMappable(norm=scale, cmap=tint)
        figure.colorbar(handle, ax=row.tolist(), aspect=8, pad=0.01, format="%.1fx")


def draw(runs: dict[str, tuple[Classifier, History]], split: Split, output: Path) -> None:
    """Write the picture to `output`: curves above, below them one held-out image a digit and its maps."""
    chosen = [int((split.test_labels == digit).nonzero()[0]) for digit in range(CLASSES)]
    images, labels = split.test_images[chosen], split.test_labels[chosen]
    maps = {name: class_token_maps(model, images) for name, (model, _) in runs.items()}
    figure = plt.figure(figsize=(12, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.0, 1.1], hspace=0.05).flat
    draw_curves(top.subplots(1, 2), {name: history for name, (_, history) in runs.items()})
    bottom.suptitle("Where the class token looks (first block, mean over heads; 1.0x is an even share)")
    draw_maps(bottom, images, labels, maps)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def summary(histories: dict[str, History], held_out: int) -> Table:
    """The closing table: a row for each contender."""
    table = Table(title=f"Accuracy on {held_out} held-out images")
    for heading in ("attention", "parameters", "training loss", "test accuracy", "seconds"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for name, history in histories.items():
        cells = (f"{history.parameters:,}", f"{history.loss[-1]:.4f}", f"{history.accuracy[-1]:.2%}")
        table.add_row(name, *cells, f"{history.seconds:.1f}")
    return table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = partial(parser.add_argument, metavar="N", type=whole)
    parser.add_argument(
        "--score",
        choices=("inverse", "negative", "laplacian"),
        default="inverse",
        help="how an L1 distance x becomes a score: 1/(eps+x), -x or exp(-x) (default: %(default)s)",
    )
    add("--epochs", default=30, help="passes over the training images (default: %(default)s)")
    add("--batch-size", default=64, help="images in one step (default: %(default)s)")
    add("--lr", metavar="X", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--layers", default=2, help="transformer blocks (default: %(default)s)")
    add("--width", default=32, help="channels of a token, a multiple of --heads (default: %(default)s)")
    add("--heads", default=4, help="attention heads (default: %(default)s)")
    seeded = "of the split, the initial weights and the order of batches (default: %(default)s)"
    add("--seed", type=partial(whole, minimum=0), default=0, help=seeded)
    busy = "CPU threads; steps this small gain little, and lose on a busy machine (default: %(default)s)"
    add("--threads", default=1, help=busy)
    picture = "where the picture goes (default: %(default)s)"
    add("--output", metavar="FILE", type=Path, default=Path("digits.png"), help=picture)
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output must lie in an existing folder, got {args.output}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train both, print the table, write the picture; 0 if L1 attention reaches the target, else 1."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    split = load_split(args.seed)
    contenders: dict[str, Scores] = {
        "L1": partial(l1_attention_scores, score=args.score),
        "dot product": dot_product_scores,
    }
    runs = train_all(contenders, split, args, console)
    draw(runs, split, args.output)
    histories = {name: history for name, (_, history) in runs.items()}
    console.print(summary(histories, len(split.test_labels)))
    console.print(f"picture: {args.output}")
    reached = histories["L1"].accuracy[-1] >= TARGET
    if not reached:
        console.print(f"L1 attention stayed under {TARGET:.0%}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
