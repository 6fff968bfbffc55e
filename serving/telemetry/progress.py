"""How far a long work on bytes has come: a bar on a terminal, a line now and then in a log.

Knows neither files nor networks.
"""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)
SHARE_OF_A_LINE = 0.1
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0


class Progress:
    """Shows bytes done of bytes to do, the rate and the time left; a context manager that ends at 100 %.

    Where standard error is no terminal, as in a container, a line is logged when a tenth more is done (but at most one
    a second), or when ten seconds went by since the last one.

    Args:
        what: such as "Loading weights".
        total_bytes: how many there are; may be set until the first update.
        terminal: whether to draw a bar; by default where standard error is a terminal.
    """

    def __init__(
        self, what: str, total_bytes: int = 0, *, terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.total_bytes = total_bytes
        self._what, self._clock = what, clock
        self._done = self._told = 0
        self._began = self._told_at = clock()
        drawn = sys.stderr.isatty() if terminal is None else terminal
        self._bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=not drawn)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if self._told:  # somebody who saw a tenth wants to see the end
                self._told_at -= LONGEST_WAIT_S
            self.update(self.total_bytes - self._done)
        self._bar.close()

    def update(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        self._bar.total = self.total_bytes
        self._bar.update(count)
        if self._bar.disable:
            self._tell()

    def _tell(self) -> None:
        now = self._clock()
        waited = now - self._told_at
        further = self._done - self._told >= SHARE_OF_A_LINE * self.total_bytes
        if waited < (SHORTEST_WAIT_S if further else LONGEST_WAIT_S):
            return
        self._told, self._told_at = self._done, now
        share = self._done / self.total_bytes if self.total_bytes else 1.0
        rate = self._done / max(now - self._began, 1e-9)
        log.info(
            "%s: %d %%, %.2f of %.2f GB, %.0f MB/s, %.0f s left",
            self._what, 100 * share, self._done / 1e9, self.total_bytes / 1e9, rate / 1e6,
            (self.total_bytes - self._done) / max(rate, 1.0),
        )  # fmt: skip
