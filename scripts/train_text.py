#!/usr/bin/env python3
"""Train small language models on Python's own documentation, with dot-product and with L1 attention.

The text is what Python's `help()` knows of the language (`pydoc_data.topics`, about 375,000 characters; nothing is
downloaded). Its last tenth is held out. Models read characters and predict the next one. They have the same
parameters, and with the same seed start from the same numbers and see the same batches; only the attention differs:
the dot product, L1 with the score "inverse", L1 with the score "negative".

Prints the bits per held-out character (lower is better) and what each model writes, and draws all runs. Nothing is
chosen by the held-out text: the models judged are those after the last step.

    python scripts/train_text.py                                             3 seeds of each
"""

from __future__ import annotations

import argparse
import sys

try:
    from demolib import options, text
    from demolib.model import NAMES
    from demolib.picture import Curve, Panel, draw
    from demolib.report import mean_and_range
    from demolib.runs import run_all
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    sys.exit(f'train_text.py needs {missing}, not installed here: pip install "l1attn_cupy[demo]"')

Results = dict[text.Setting, text.Result]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options.make_parser(__doc__)
    options.add_shared(parser, attention="dot,inverse,negative", steps=2000, batch_size=32, lr=3e-3, output="text.png")
    whole, default = options.whole, "(default: %(default)s)"
    parser.add_argument("--layers", metavar="N", type=whole, default=2, help=f"transformer blocks {default}")
    seen = f"characters that the model sees {default}"
    parser.add_argument("--context", metavar="N", type=whole, default=64, help=seen)
    written = f"characters that each model writes {default}"
    parser.add_argument("--sample", metavar="N", type=whole, default=300, help=written)
    args = parser.parse_args(argv)
    options.check_shared(parser, args)
    if args.context > text.LONGEST_CONTEXT:
        parser.error(f"--context must be at most {text.LONGEST_CONTEXT}, got {args.context}")
    return args


def make_settings(args: argparse.Namespace) -> list[text.Setting]:
    """All runs: for each contender all seeds."""
    return [
        text.Setting(
            attention=attention,
            seed=seed,
            size=options.size(args, args.layers, layer_norm=True),
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            context=args.context,
            sample=args.sample,
        )
        for attention in args.attention
        for seed in range(args.seeds)
    ]


def summary(results: Results) -> Table:
    """A row for each contender."""
    table = Table(title=f"Python's documentation after {next(iter(results)).steps:,} steps")
    for heading in ("attention", "parameters", "bits per character (range)", "seconds"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for attention in dict.fromkeys(setting.attention for setting in results):
        runs = [run for setting, run in results.items() if setting.attention == attention]
        bits = mean_and_range([run.bits[-1] for run in runs], 3)
        seconds = sum(run.seconds for run in runs) / len(runs)
        table.add_row(NAMES[attention], f"{runs[0].parameters:,}", bits, f"{seconds:.0f}")
    return table


def main(argv: list[str] | None = None) -> None:
    """Train all, draw the picture, print samples and the table."""
    args = parse_args(argv)
    console = Console()
    settings = make_settings(args)
    bars = {f"{NAMES[s.attention]}, seed {s.seed}": s for s in settings}
    results = dict(zip(settings, run_all(text.train, bars, args.steps, args.processes, console), strict=True))
    frequencies = text.bits_of_frequencies(*text.split(text.load_text()))
    curves = [Curve(setting.attention, result.steps, result.bits) for setting, result in results.items()]
    panel = Panel("Python's documentation, held-out part", curves, (frequencies, "frequencies of characters alone"))
    draw([panel], "bits per character", args.output)
    for setting, result in results.items():
        if setting.seed == 0:
            console.rule(NAMES[setting.attention])
            console.print(result.sample, markup=False, highlight=False)
    console.print(summary(results))
    console.print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
