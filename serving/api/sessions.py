"""SageMaker's sticky sessions: which are open, for whom and until when.

Knows no block: what a session keeps is the engine's matter.
"""

import time
import uuid
from typing import Any

from serving.bridge import Bridge
from serving.errors import Overloaded, UnknownSession
from serving.protocol import Session

MOST = 65_536  # open at a time


class Sessions:
    """Opens, finds and closes sessions; one is never found with another key's salt.

    Args:
        lifetime_s: seconds that a session lives, whether it is used or not.
    """

    def __init__(self, bridge: Bridge[Any], lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self._bridge = bridge
        self._open: dict[tuple[str, str], Session] = {}  # in the order of their ends

    def open(self, cache_salt: str) -> Session:
        """A new session. Raises Overloaded: there are too many."""
        self._forget_ended()
        if len(self._open) >= MOST:
            raise Overloaded
        session = Session(str(uuid.uuid4()), time.monotonic() + self.lifetime_s)
        self._open[cache_salt, session.id] = session
        return session

    def find(self, session_id: str, cache_salt: str) -> Session:
        """An open session. Raises UnknownSession."""
        self._forget_ended()
        try:
            return self._open[cache_salt, session_id]
        except KeyError:
            raise UnknownSession(session_id) from None

    def close(self, session: Session, cache_salt: str) -> None:
        """End a session before its time."""
        self._open.pop((cache_salt, session.id), None)
        self._bridge.end_session(cache_salt, session.id)

    def _forget_ended(self) -> None:
        now = time.monotonic()
        while self._open and (first := next(iter(self._open.items())))[1].expires <= now:
            del self._open[first[0]]  # the engine ends what it kept for it by itself
