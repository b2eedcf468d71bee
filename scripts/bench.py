#!/usr/bin/env python3
"""Speed, memory and start-up of L1 scores, beside other ways to compute them and the machine's own limit.

    python scripts/bench.py                                everything on the CPU, about ten minutes
    python scripts/bench.py --quick                        about one
    python scripts/bench.py --only forward --shapes main   one figure
    python scripts/bench.py --only attention               fused attention: time, causality, decoding
    python scripts/bench.py --ring                         one sequence on several processes: time, memory of each
    python scripts/bench.py --huge-pages                   without most page faults of new results
    python scripts/bench.py --device cuda --json gpu.json  on a GPU
    python scripts/bench.py --only growth --length 8192    time of a term and memory as the length doubles
    python scripts/bench.py --plot --markdown              README's pictures and tables anew from benchmarks/*.json,
                                                           nothing is run

One term is one |q - k| added to one sum. A forward has B*L*S*E terms; a backward has as many for dquery and
as many again for dkey; forward+backward is the three together. Nothing here asserts a time: the exit status
is 1 only if a result of ours is wrong or cannot be computed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import torch  # noqa: F401
except ImportError as error:
    raise SystemExit(f"{error}; the benchmark needs pip install 'l1attn_cupy[bench]'") from error

from benchlib import footprint, markdown, report
from benchlib.attention import attention, clock_of
from benchlib.cases import ITEMSIZE
from benchlib.growth import SHORTEST, growth
from benchlib.limits import Limits
from benchlib.peers import OURS, PEERS
from benchlib.ring import ring
from benchlib.saved import BadFile
from benchlib.settings import PARTS, Settings, method, settle
from benchlib.speed import time_cases

RUN: dict[str, Callable[[Settings], Any]] = {
    "attention": attention,
    "growth": growth,
    "memory": footprint.memory,
    "overhead": footprint.overhead,
    "startup": footprint.startup,
    "ring": ring,
}


def arguments() -> argparse.Namespace:
    """The options, with every name in a list checked."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes, peers and rounds, no start-up times")
    parser.add_argument("--shapes", help="main, long, wide, grid or BxLxSxE, comma-separated")
    parser.add_argument("--dtype", help="comma-separated; default float32, and a second one at the main shape")
    parser.add_argument("--repeats", type=int, help="most rounds of one peer (default 9, on a GPU 25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--markdown", action="store_true", help="README's tables from benchmarks/*.json")
    parser.add_argument("--plot", action="store_true", help="the pictures in docs/pictures from benchmarks/*.json")
    parser.add_argument("--only", help=f"comma-separated of {', '.join(PARTS)} (default all)")
    parser.add_argument("--ring", action="store_true", help="ring attention alone, which other runs leave out")
    parser.add_argument("--peers", help=f"comma-separated of {', '.join(PEERS)}")
    parser.add_argument("--length", type=int, metavar="N", help="the longest of growth (default 65536)")
    parser.add_argument("--seconds", type=float, help="that the run may take: what does not fit in is left out")
    parser.add_argument("--threads", type=int, help="CPU threads of every peer (default: torch's)")
    huge = "let torch put large CPU tensors in huge pages: a fault per 2 MiB of a new result, not per 4 KiB"
    parser.add_argument("--huge-pages", action="store_true", help=huge)
    options = parser.parse_args()
    if options.ring and options.only:
        parser.error("--ring runs alone, without --only")
    if options.length is not None and options.length < SHORTEST:
        parser.error(f"--length must be at least {SHORTEST}, got {options.length}")
    lists = (
        (options.only, PARTS, "--only"),
        (options.peers, PEERS, "--peers"),
        (options.dtype, ITEMSIZE, "--dtype"),
    )
    for given, known, name in lists:
        unknown = set(given.split(",")) - set(known) if given else set()
        if unknown:
            parser.error(f"{name} takes {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return options


def refresh(options: argparse.Namespace) -> None:
    """README's tables and pictures from the files of results; one that cannot be read is an error that names it."""
    try:
        if options.plot:
            from benchlib import pictures  # needs matplotlib, which a run does not

            for file in pictures.draw_all():
                print(file)
        if options.markdown:
            markdown.write()
    except (BadFile, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def command() -> str:
    """That of this run, without the folder of the file that it writes."""
    return re.sub(r"(--json[ =])\S*/", r"\1", " ".join(["scripts/bench.py", *sys.argv[1:]]))


def measure(settings: Settings, result: dict[str, Any]) -> bool:
    """Put the parts asked for into ``result``, one after another; False if a result of ours is missing or wrong."""
    good = True
    if settings.ops:
        limits = Limits(settings)
        rows = time_cases(settings, limits)
        text, result["limits"] = limits.summary()
        print(f"\n{text}", flush=True)
        result["rows"] = [row.as_dict() for row in rows]
        result["copy, GB/s"] = clock_of(settings).copy_bandwidth() / 1e9
        good = not any(row.peer == OURS and row.median is None for row in rows)
    for name, part in RUN.items():
        if name in settings.only and settings.has_time(name, name):
            try:
                result[name] = part(settings)
            except Exception as error:  # the parts after it, and the file, are still of use
                traceback.print_exc()
                result.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
                good = False
    broken = [note for note in result.get("growth", {}).get("notes", ()) if note["peer"] == OURS and "error" in note]
    missing = [
        one for one in result.get("attention", {}).get("contest", ()) if one["peer"].startswith(OURS) and not one["ms"]
    ]
    ring_broken = [record for record in result.get("ring", ()) if "error" in record]
    return good and not (broken or missing or ring_broken)


def main() -> int:
    """Run the parts asked for; 1 if a result of ours is missing or wrong. What is there is written, come what may."""
    options = arguments()
    if options.markdown or options.plot:
        refresh(options)
        return 0
    settings = settle(options)
    neighbours = report.Neighbours()
    stated = method(settings)
    print("\n".join(stated), flush=True)
    result: dict[str, Any] = {
        "device": stated[0].split(None, 1)[1],
        "versions": report.versions(),
        "method": stated,
        "command": command(),
    }
    try:
        good = measure(settings, result)
    except KeyboardInterrupt:
        good, result["interrupted"] = False, True
        print("\ninterrupted")
    finally:
        seconds = time.perf_counter() - settings.begin
        result |= {"neighbours": neighbours.describe(), "seconds": round(seconds, 1), "left out": settings.left_out}
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    if settings.left_out:
        print(f"\nleft out for want of time: {'; '.join(settings.left_out)}")
    print(f"\n{result['neighbours']}; the whole run took {seconds:.0f} s")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
