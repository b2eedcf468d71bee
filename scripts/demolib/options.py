"""Command-line options that the demonstrations share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from .model import ATTENTIONS, Size
from .runs import cores


def whole(text: str, minimum: int = 1) -> int:
    """A whole number of at least `minimum`, for argparse."""
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return number


def listed(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Names out of `choices`, comma-separated, each once, for argparse."""
    known = list(choices)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known) or len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"must be some of {','.join(known)}, each once, got {text}")
        return names

    return parse


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as it is."""
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=shown, allow_abbrev=False)


def add_shared(
    parser: argparse.ArgumentParser, *, attention: str, steps: int, batch_size: int, lr: float, output: str
) -> None:
    """The options of both scripts, with these defaults."""
    add = partial(parser.add_argument, metavar="N", type=whole)
    names = f"some of {','.join(ATTENTIONS)} (default: %(default)s)"
    parser.add_argument("--attention", metavar="LIST", type=listed(ATTENTIONS), default=attention, help=names)
    add("--seeds", default=3, help="runs of each attention, with seeds 0 to N - 1 (default: %(default)s)")
    add("--steps", default=steps, help="steps of a run (default: %(default)s)")
    add("--batch-size", default=batch_size, help="examples in a step (default: %(default)s)")
    parser.add_argument("--lr", metavar="X", type=positive, default=lr, help="learning rate (default: %(default)s)")
    add("--width", default=64, help="channels of a token, a multiple of --heads (default: %(default)s)")
    add("--heads", default=4, help="attention heads (default: %(default)s)")
    once = "runs at once, each on a core (default: as many as there are cores, here %(default)s)"
    add("--processes", default=cores(), help=once)
    picture = "where the picture goes (default: %(default)s)"
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path(output), help=picture)


def check_shared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whatever no option can check by itself; a mistake ends the program."""
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output must lie in an existing folder, got {args.output}")
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output must end in .png, .svg or .pdf, got {args.output}")


def size(args: argparse.Namespace, layers: int, *, layer_norm: bool) -> Size:
    """The model's size."""
    return Size(layers=layers, embed_dim=args.width, num_heads=args.heads, layer_norm=layer_norm)
