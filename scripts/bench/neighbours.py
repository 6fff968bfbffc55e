"""How much of the machine other processes took while something was measured.

Knows no benchmark. On a shared machine a figure without this number is worth little.
"""

import contextlib
import os
import time
from types import TracebackType
from typing import Self

import psutil


class Neighbours:
    """Measures, as a context, the processors that were busy for somebody else.

    This process and its descendants count as ours; steal (a hypervisor's other guests) counts as others'.

    Attributes:
        cores: mean number of processors kept busy by others, once the context has ended.
    """

    def __init__(self, also_ours: int | None = None) -> None:
        """`also_ours`: a process that is no descendant and counts as ours, with its own descendants."""
        self._roots = [os.getpid(), *([also_ours] if also_ours is not None else [])]
        self.cores = 0.0

    def __enter__(self) -> Self:
        self._begun, self._machine, self._ours = time.monotonic(), _machine_s(), self._ours_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = time.monotonic() - self._begun
        busy = (_machine_s() - self._machine) - (self._ours_s() - self._ours)
        self.cores = max(0.0, busy / elapsed) if elapsed > 0 else 0.0

    def _ours_s(self) -> float:
        return sum(_tree_s(psutil.Process(pid)) for pid in self._roots if psutil.pid_exists(pid))


def _machine_s() -> float:
    """Seconds that all processors together were not idle; `user` already holds the guests' share."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _tree_s(root: psutil.Process) -> float:
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # With the children that have ended and been waited for.
            total += times.user + times.system + times.children_user + times.children_system
    return total
