"""The limits of this run's device, made once for each op and dtype."""

from __future__ import annotations

from typing import Any

from benchlib import report
from benchlib.limit_cuda import HAS_LIMIT, CudaLimit
from benchlib.settings import Settings

SAMPLES = 9


class Limits:
    """Loops of nothing but arithmetic; `of` hands them to a contest, `summary` measures each on its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.made: dict[tuple[str, str], Any] = {}
        self.problem = ""

    def of(self, dtype: str) -> dict[str, Any]:
        """op -> limit, for the ops that are timed; {} where no limit can be measured."""
        found = {}
        for op in sorted(self.settings.ops & {"forward", "backward"}):
            if self.settings.cuda and dtype not in HAS_LIMIT[op]:
                continue
            try:
                if (op, dtype) not in self.made:
                    self.made[op, dtype] = self.make(op, dtype)
                found[op] = self.made[op, dtype]
            except ImportError as error:
                package = "cupy-cuda12x or cupy-cuda13x" if self.settings.cuda else "numba"
                self.problem = f"no limit was measured: {error}; pip install {package}"
        return found

    def make(self, op: str, dtype: str) -> Any:
        """A new one."""
        if self.settings.cuda:
            return CudaLimit(op, dtype)
        from benchlib.limit_cpu import CpuLimit

        return CpuLimit(op, dtype, self.settings.threads)

    def summary(self) -> tuple[str, list[dict[str, Any]]]:
        """A table and its records: fresh samples of every limit, with nothing else in between."""
        records, lines = [], []
        for (op, dtype), limit in self.made.items():
            rates = sorted(1.0 / limit.sample().wall for _ in range(SAMPLES))
            median, low, high = rates[SAMPLES // 2], rates[0], rates[-1]
            what = limit.describe()
            records.append({"op": op, "dtype": dtype, "median": median, "low": low, "high": high, "what": what})
            lines.append([op, dtype, report.number(median), report.spread(low, high), what])
        text = report.table(["limit", "dtype", "1e9 terms/s", "min..max", "what runs"], lines)
        return self.problem or text, records
