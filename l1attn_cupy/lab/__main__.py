"""The kernel lab: edit a .cu file, see at once whether it is right and how fast it is.

  list                             every op and variant, and which one a call would use
  new NAME --from VARIANT          copy a variant into your folder, its header ready to edit
  try FILE [--watch]               is it right, what does it cost, how fast is it; again on each save
  tune OP --shapes BxLxSxE ...     find the best of the parameters that a file lists (BLOCK_Q=64,128)
  report OP                        a page with all variants of an op beside the limits

Your folder is the one that the environment variable L1ATTN_KERNELS names. Without a GPU, kernels are checked by
emulation and compared by machine code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_NEEDS = ("rich", "torch", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is well, 1 if a kernel is not, 2 if the command cannot be done."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # many short operations: threads would wait for one another
    try:
        for name in _NEEDS:
            __import__(name)
    except ModuleNotFoundError as error:
        print(f'the lab needs {error.name}: pip install "l1attn_cupy[lab]"', file=sys.stderr)
        return 2
    from ..cuda.machine_code import ToolMissing
    from ..cuda.registry import KernelError

    try:
        return int(options.command(options) or 0)
    except (KernelError, ToolMissing, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return 1
    except OSError as error:  # a file that cannot be read or written
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    shown = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m l1attn_cupy.lab", description=__doc__, formatter_class=shown)
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, description=text)
        added.set_defaults(command=run)
        return added

    def architecture(added: argparse.ArgumentParser) -> None:
        text = "compute capability whose machine code to look at (default: the GPU's, or 90)"
        added.add_argument("--arch", metavar="90", help=text)

    listed = command("list", _list, "every op and variant, and which one a call would use")
    listed.add_argument("op", nargs="?", help="this op alone")
    listed.add_argument("--shape", metavar="BxLxSxE", help="say which variant a call of this shape gets, and why")
    listed.add_argument("--dtype", help="f32, f16, bf16 or f64")
    architecture(listed)

    copied = command("new", _new, "copy a variant into your folder (L1ATTN_KERNELS), its header ready to edit")
    copied.add_argument("name", metavar="NAME", help="what variant= will take")
    copied.add_argument(
        "--from", dest="origin", required=True, metavar="VARIANT", help="gather, or scores_forward_gather"
    )

    tried = command("try", _try, "compile a file, check it against the float64 formula, say what it costs, time it")
    tried.add_argument("file", metavar="FILE", help="a .cu file: its path, or its name in your folder")
    tried.add_argument("--watch", action="store_true", help="again on each save, until Ctrl-C")
    tried.add_argument("--backend", choices=("cuda", "emulator"), help="default: a GPU if there is one")
    tried.add_argument("--shape", default="", metavar="BxLxSxE", help="what to time on a GPU (default 8x1024x1024x64)")
    tried.add_argument("--limit", type=_seconds, default=10.0, metavar="SECONDS", help="for one launch (default 10)")
    architecture(tried)

    tuned = command("tune", _tune, "try the parameters that a file lists, and write the best to a tuning file")
    tuned.add_argument("op", metavar="OP")
    tuned.add_argument("--shapes", nargs="+", required=True, metavar="BxLxSxE")
    tuned.add_argument("--dtype", nargs="+", help="f32, f16, bf16, f64 (default: all that the variant takes)")
    tuned.add_argument("--variant", help="this one (default: the one that a call of the shape gets)")
    tuned.add_argument("--output", type=Path, metavar="FILE", help="default: tuning/DEVICE.json in your folder")
    tuned.add_argument("--backend", choices=("cuda", "emulator"), help="default: a GPU if there is one")
    tuned.add_argument("--limit", type=_seconds, default=10.0, metavar="SECONDS", help="for one launch (default 10)")
    architecture(tuned)

    reported = command("report", _report, "a page with all variants of an op beside the limits")
    reported.add_argument("op", metavar="OP")
    reported.add_argument("--output", type=Path, metavar="FILE", help="a .html or .png file (default OP.html)")
    reported.add_argument("--shape", default="", metavar="BxLxSxE", help="default 8x1024x1024x64")
    reported.add_argument("--dtype", default="f32", help="f32, f16, bf16 or f64 (default f32)")
    reported.add_argument(
        "--bench", type=Path, metavar="FILE", help="peers and limits from what scripts/bench.py --json wrote"
    )
    architecture(reported)
    return made


# ---- options ------------------------------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _op(name: str) -> str:
    from ..cuda import registry

    if name not in registry.OPS:
        raise ValueError(f"OP must be one of {', '.join(registry.OPS)}, got {name}")
    return name


def _dtype(name: str | None) -> str | None:
    from ..cuda import registry

    known = {**registry.DTYPES, **{name: name for name in registry.DTYPES.values()}}
    if name is not None and name not in known:
        raise ValueError(f"--dtype must be one of {', '.join(registry.DTYPES)}, got {name}")
    return known[name] if name else None


def _arch(name: str | None) -> str | None:
    from ..cuda.occupancy import MULTIPROCESSORS

    if name is None:
        return None
    bare = name.removeprefix("sm_").replace(".", "")
    if bare not in MULTIPROCESSORS:
        raise ValueError(f"--arch must be one of {', '.join(MULTIPROCESSORS)}, got {name}")
    return bare


# ---- commands -----------------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    from ..cuda import registry
    from . import checking, listing, screen, shapes

    shape = shapes.parse(options.shape) if options.shape else None
    ops = [_op(options.op)] if options.op else list(registry.OPS)
    arch = _arch(options.arch) or checking.choose_backend(None).arch
    listing.show(screen.console(), ops, _dtype(options.dtype), shape, arch)


def _new(options: argparse.Namespace) -> None:
    from . import new

    file = new.new(options.name, options.origin)
    print(f"{file}: edit it, then try it:\n  python -m l1attn_cupy.lab try {file.name} --watch")


def _try(options: argparse.Namespace) -> int:
    from . import shapes, trying

    shape = shapes.parse(options.shape) if options.shape else shapes.USUAL
    settings = (trying.find(options.file), options.backend, _arch(options.arch), options.limit, shape)
    if options.watch:
        trying.watch(*settings)
        return 0
    return 0 if trying.once(*settings) else 1


def _tune(options: argparse.Namespace) -> int:
    from . import shapes, tune

    dtypes = [found for name in options.dtype or () if (found := _dtype(name))]
    wanted = tune.Wanted(
        _op(options.op),
        [shapes.parse(text) for text in options.shapes],
        dtypes,
        options.variant,
        _arch(options.arch),
        options.backend,
        options.limit,
    )
    return tune.run(wanted, options.output)


def _report(options: argparse.Namespace) -> None:
    from . import report, shapes

    shape = shapes.parse(options.shape) if options.shape else shapes.USUAL
    output = options.output or Path(f"{options.op}.html")
    report.write(_op(options.op), _dtype(options.dtype) or "float32", shape, _arch(options.arch), options.bench, output)
    print(output)


if __name__ == "__main__":
    sys.exit(main())
