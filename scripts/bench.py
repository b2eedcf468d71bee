#!/usr/bin/env python3
"""Speed, memory and start-up of L1 scores, beside other ways to compute them and the machine's own limit.

    python scripts/bench.py                                everything on the CPU, about ten minutes
    python scripts/bench.py --quick                        about one
    python scripts/bench.py --only forward --shapes main   one figure
    python scripts/bench.py --only attention               fused attention: time, causality, memory
    python scripts/bench.py --ring                         one sequence on several processes: time, memory of each
    python scripts/bench.py --huge-pages                   without most page faults of new results
    python scripts/bench.py --device cuda --json gpu.json  on a GPU
    python scripts/bench.py --markdown                     README's tables anew from benchmarks/*.json, nothing is run

One term is one |q - k| added to one sum. A forward has B*L*S*E terms; a backward has as many for dquery and
as many again for dkey; forward+backward is the three together. Nothing here asserts a time: the exit status
is 1 only if a result of ours is wrong or cannot be computed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    import torch  # noqa: F401
except ImportError as error:
    raise SystemExit(f"{error}; the benchmark needs pip install 'l1attn_cupy[bench]'") from error

from benchlib import footprint, markdown, report
from benchlib.attention import attention
from benchlib.cases import ITEMSIZE
from benchlib.limits import Limits
from benchlib.peers import OURS, PEERS
from benchlib.ring import ring
from benchlib.settings import PARTS, method, settle
from benchlib.speed import time_cases


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
    parser.add_argument("--only", help=f"comma-separated of {', '.join(PARTS)} (default all)")
    parser.add_argument("--ring", action="store_true", help="ring attention alone, which other runs leave out")
    parser.add_argument("--peers", help=f"comma-separated of {', '.join(PEERS)}")
    parser.add_argument("--threads", type=int, help="CPU threads of every peer (default: torch's)")
    huge = "let torch put large CPU tensors in huge pages: a fault per 2 MiB of a new result, not per 4 KiB"
    parser.add_argument("--huge-pages", action="store_true", help=huge)
    options = parser.parse_args()
    if options.ring and options.only:
        parser.error("--ring runs alone, without --only")
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


def main() -> int:
    """Run the parts asked for; 1 if a result of ours is missing or wrong."""
    begin = time.perf_counter()
    options = arguments()
    if options.markdown:
        markdown.write()
        return 0
    settings = settle(options)
    neighbours = report.Neighbours()
    stated = method(settings)
    print("\n".join(stated), flush=True)
    result: dict[str, Any] = {
        "device": stated[0].split(None, 1)[1],
        "versions": report.versions(),
        "method": stated,
    }
    failed = False
    if settings.ops:
        limits = Limits(settings)
        rows = time_cases(settings, limits)
        text, result["limits"] = limits.summary()
        print(f"\n{text}", flush=True)
        result["rows"] = [row.as_dict() for row in rows]
        failed = any(row.peer == OURS and row.median is None for row in rows)
    parts = {
        "attention": attention,
        "memory": footprint.memory,
        "overhead": footprint.overhead,
        "startup": footprint.startup,
        "ring": ring,
    }
    result |= {name: part(settings) for name, part in parts.items() if name in settings.only}
    failed |= any("error" in record for record in result.get("ring", ()))
    result |= {"neighbours": neighbours.describe(), "seconds": round(time.perf_counter() - begin, 1)}
    print(f"\n{result['neighbours']}; the whole run took {result['seconds']:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
