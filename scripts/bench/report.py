"""How a benchmark reports: a table for a reader, then one JSON line for a program.

Knows no benchmark and no model.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from serving.errors import WeirError
from serving.runner.memory import cpu_count

# How threads wait for each other decides a step's time as soon as they share a processor with somebody.
_OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, and between what they lay."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """At least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.least)}..{_short(self.most)})"

    def record(self) -> dict[str, float]:
        """For JSON."""
        return {"median": _rounded(self.median), "min": _rounded(self.least), "max": _rounded(self.most)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` per cent do not exceed (nearest rank); None of no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def parser(script: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A command line whose help keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"python -m scripts.{script}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(main: Callable[[], int]) -> NoReturn:
    """Leave with what `main` returns; what Weir raises on purpose is said in one line, without a traceback."""
    try:
        sys.exit(main())
    except WeirError as error:
        sys.exit(f"error: {error}")


def at_least_one(text: str) -> int:
    """An argument's type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def environment() -> dict[str, Any]:
    """What a reader must know of the machine to judge a figure."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpus": cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "openmp": {name: os.environ[name] for name in _OPENMP if name in os.environ},
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    texts = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in texts) for column in range(len(headers))]
    texts.insert(1, ["-" * width for width in widths])
    for line in texts:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def finish(record: dict[str, Any]) -> None:
    """Print the one JSON line that a benchmark ends with."""
    print(f"other processes kept {record['neighbour_cores']:.2f} processors busy meanwhile")
    print(json.dumps(_plain(record)))
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value.record()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _rounded(value) if isinstance(value, float) else value


def _rounded(value: float) -> float:
    """Five significant digits: more would be noise."""
    return float(f"{value:.5g}")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return _short(value) if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
