"""How far a long work on bytes has come: a bar on a terminal, and where there is none a line in the log now and then.

Knows nothing of the work.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

SHARE_OF_A_LINE = 0.1
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0

log = logging.getLogger(__name__)


class Progress:
    """Counts bytes from any thread; shows how many of all, the rate and the time left; ends at 100 %.

    Where standard error is no terminal, as in a container, a line is logged when a tenth more is done (but at most one
    a second), or when ten seconds went by since the last one.

    Args:
        what: is going on.
        total: bytes that will come.
        shown: false counts in silence.
        terminal: whether to draw a bar; by default where standard error is a terminal.
        clock: seconds, for tests.
    """

    def __init__(
        self, what: str, total: int, *, shown: bool = True, terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._what, self._total, self._clock = what, total, clock
        self._done = self._told = 0
        self._began = self._told_at = clock()
        self._lock = threading.Lock()
        drawn = sys.stderr.isatty() if terminal is None else terminal
        self._logged = shown and not drawn
        self._bar = tqdm(
            desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not (shown and drawn)
        )

    def add(self, count: int) -> None:
        """That many bytes are done; negative where some have to be done again."""
        with self._lock:
            self._done += count
            self._bar.update(count)
            line = self._line_when_due()
        if line is not None:
            log.info("%s", line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._done < self._total:
            self.add(self._total - self._done)  # what did not have to be done
        if kind is None and 0 < self._told < self._total and self._logged:
            log.info("%s", self._line())  # who saw a part wants to see the end
        self._bar.close()

    def _line_when_due(self) -> str | None:
        now = self._clock()
        further = self._done - self._told >= SHARE_OF_A_LINE * self._total
        if not self._logged or now - self._told_at < (SHORTEST_WAIT_S if further else LONGEST_WAIT_S):
            return None
        self._told, self._told_at = self._done, now
        return self._line()

    def _line(self) -> str:
        rate = self._done / max(self._clock() - self._began, 1e-6)
        left_s = max(0, self._total - self._done) / max(rate, 1.0)
        return (
            f"{self._what}: {100 * self._done // max(self._total, 1)} %, {self._done / 1e9:.2f} of "
            f"{self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left_s:.0f} s left"
        )
