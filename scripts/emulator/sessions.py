"""Stateful sessions: which instance a session lives on, and the two spellings by which a container opens one.

Knows no container: whether a session exists is the container's to say.
"""

import re
import threading
from collections.abc import Mapping

from scripts.emulator.instance import Instance
from scripts.emulator.journal import Journal

SESSION = "X-Amzn-SageMaker-Session-Id"
NEW = "X-Amzn-SageMaker-New-Session-Id"
CLOSED = "X-Amzn-SageMaker-Closed-Session-Id"
NEW_SESSION = "NEW_SESSION"
OPENED = re.compile(r"([a-zA-Z0-9](?:-*[a-zA-Z0-9])*);\sExpires=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
LONGEST_ID = 256
IDENTIFIER = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")


class Sessions:
    """The sessions of an endpoint. Safe to use from several threads."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._instances: dict[str, Instance] = {}

    def instance_of(self, session: str | None) -> Instance | None:
        """Where a session lives; None for none, a new and an unknown one."""
        with self._lock:
            return self._instances.get(session or "")

    def note(self, asked: str | None, answer: Mapping[str, str], instance: Instance) -> dict[str, str]:
        """Read an answer's session headers, and return those that the client gets.

        Args:
            asked: the session that the request named, which may be NEW_SESSION.
            answer: the container's headers.
            instance: that answered.
        """
        if asked == NEW_SESSION:
            return self._opened(answer.get(NEW) or answer.get(SESSION), instance)
        closed = answer.get(CLOSED)
        if closed is None:
            return {}
        with self._lock:
            self._instances.pop(closed, None)
        return {CLOSED: closed}

    def _opened(self, value: str | None, instance: Instance) -> dict[str, str]:
        if value is None:
            self._journal.advise(
                f"NEW_SESSION was answered without {NEW} or {SESSION}: the client will see no NewSessionId"
            )
            return {}
        match = OPENED.fullmatch(value)
        if match is None:
            self._journal.blame(
                f"a session was opened as {value!r}; the API's form is '<id>; Expires=yyyy-mm-ddThh:mm:ssZ' with "
                "letters, digits and inner hyphens in the id"
            )
            return {NEW: value}
        with self._lock:
            self._instances[match[1]] = instance
        return {NEW: value}
