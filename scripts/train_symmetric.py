#!/usr/bin/env python3
"""Train small transformers on the symmetric problem, with dot-product and with L1 attention, several seeds each.

Each of 16 tokens has 10 random symbols (normal / 2) and a random position, given at 4 scales. Two tokens share
the same symbols. The answer is how far their positions are apart. A query that looks for its twin should
attend to the key that is like itself and not to the largest one, and must not find itself: the diagonal is masked.

Both models have the same parameters, and with the same seed start from the same numbers and see the same problems;
no problem comes twice, so the loss is one on unseen data. Loss is the mean squared error, as a running mean; a model
that knows nothing stays near 3.5. Prints at which step each run falls below 0.5, and draws all runs.

    python scripts/train_symmetric.py                                        3 seeds, 2 layers, no LayerNorm
    python scripts/train_symmetric.py --layers 1,2 --layer-norm off,on       all four settings: four times as long
"""

from __future__ import annotations

import argparse
import sys

try:
    from demolib import options, symmetric
    from demolib.model import NAMES
    from demolib.picture import Curve, Panel, draw
    from demolib.report import mean_and_range
    from demolib.runs import run_all
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    sys.exit(f'train_symmetric.py needs {missing}, not installed here: pip install "l1attn_cupy[demo]"')

Results = dict[symmetric.Setting, symmetric.Result]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options.make_parser(__doc__)
    options.add_shared(parser, attention="dot,inverse", steps=3000, batch_size=128, lr=1e-3, output="symmetric.png")
    default = "(default: %(default)s)"
    parser.add_argument(
        "--layers", metavar="LIST", type=options.listed("12"), default="2", help=f"some of 1,2 {default}"
    )
    norm = f"LayerNorm: some of off,on {default}"
    parser.add_argument("--layer-norm", metavar="LIST", type=options.listed(["off", "on"]), default="off", help=norm)
    args = parser.parse_args(argv)
    options.check_shared(parser, args)
    return args


def make_settings(args: argparse.Namespace) -> list[symmetric.Setting]:
    """All runs: for each size both contenders, for each of these all seeds."""
    return [
        symmetric.Setting(
            attention=attention,
            seed=seed,
            size=options.size(args, int(layers), layer_norm=layer_norm == "on"),
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
        )
        for layer_norm in args.layer_norm
        for layers in args.layers
        for attention in args.attention
        for seed in range(args.seeds)
    ]


def title(setting: symmetric.Setting) -> str:
    """What all contenders and seeds of a size have in common."""
    layers = "1 layer" if setting.size.layers == 1 else f"{setting.size.layers} layers"
    return f"{layers}, LayerNorm {'on' if setting.size.layer_norm else 'off'}"


def draw_results(results: Results, args: argparse.Namespace) -> None:
    """A panel for each size."""
    panels = []
    for name in dict.fromkeys(map(title, results)):
        runs = {setting: result for setting, result in results.items() if title(setting) == name}
        shown = range(9, args.steps, 10) if args.steps > 100 else range(args.steps)
        curves = [
            Curve(setting.attention, [i + 1 for i in shown], [result.loss[i] for i in shown])
            for setting, result in runs.items()
        ]
        panels.append(Panel(name, curves, (symmetric.SOLVED, "solved")))
    draw(panels, "mean squared error (running mean)", args.output, log=True, highest=6.0)


def summary(results: Results) -> Table:
    """A row for each size and contender: its final losses, and where each seed fell below `SOLVED`."""
    table = Table(title=f"The symmetric problem after {next(iter(results)).steps:,} steps")
    for heading in ("layers", "norm", "attention", "final loss (range)", f"below {symmetric.SOLVED} at step, by seed"):
        table.add_column(heading, justify="right" if "loss" in heading or "step" in heading else "left")
    for size, attention in dict.fromkeys((setting.size, setting.attention) for setting in results):
        runs = [run for setting, run in results.items() if (setting.size, setting.attention) == (size, attention)]
        loss = mean_and_range([run.loss[-1] for run in runs], 2)
        solved = ", ".join(f"{run.solved_at or 'never'}" for run in runs)
        table.add_row(str(size.layers), "on" if size.layer_norm else "off", NAMES[attention], loss, solved)
    return table


def main(argv: list[str] | None = None) -> None:
    """Train all, draw the picture, print the table."""
    args = parse_args(argv)
    console = Console()
    settings = make_settings(args)
    bars = {f"{title(s)}, {NAMES[s.attention]}, seed {s.seed}": s for s in settings}
    results = dict(zip(settings, run_all(symmetric.train, bars, args.steps, args.processes, console), strict=True))
    draw_results(results, args)
    console.print(summary(results))
    console.print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
