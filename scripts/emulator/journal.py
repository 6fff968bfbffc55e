"""What an emulator has to say: events for the person at the screen, and breaches of the contract for the exit code.

Knows not who speaks.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

KEPT = 1000


class Journal:
    """Lines with the seconds since the start. Safe to use from several threads.

    Args:
        write: gets every line; the screen, or nothing in a test.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=KEPT)
        self._breaches: list[str] = []

    def say(self, text: str) -> None:
        """Something that happened."""
        self._add("", text)

    def advise(self, text: str) -> None:
        """Something that is allowed and unwise."""
        self._add("note: ", text)

    def blame(self, text: str) -> None:
        """A breach of the container's contract."""
        with self._lock:
            self._breaches.append(text)
        self._add("BREACH: ", text)

    @property
    def lines(self) -> list[str]:
        """The newest lines."""
        with self._lock:
            return list(self._lines)

    @property
    def breaches(self) -> list[str]:
        """Every breach so far."""
        with self._lock:
            return list(self._breaches)

    def _add(self, mark: str, text: str) -> None:
        line = f"{time.monotonic() - self._begun:8.2f}  {mark}{text}"
        with self._lock:
            self._lines.append(line)
        self._write(line)
