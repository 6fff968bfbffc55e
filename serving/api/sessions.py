"""SageMaker's sticky sessions: which are open, for whom and until when.

Knows no block: what a session keeps is the engine's matter.
"""

import time
import uuid
from typing import Any

from serving.bridge import Bridge
from serving.errors import Overloaded, UnknownSession
from serving.protocol import Session

MOST = 65_536  # open at a time, of one key: none can keep another's clients out


class Sessions:
    """Opens, finds and closes sessions; one is never found with another key's salt.

    Args:
        lifetime_s: seconds that a session lives, whether it is used or not.
    """

    def __init__(self, bridge: Bridge[Any], lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self._bridge = bridge
        self._open: dict[str, dict[str, Session]] = {}  # of each salt, in the order of their ends

    def open(self, cache_salt: str) -> Session:
        """A new session. Raises Overloaded: there are too many with this salt."""
        opened = self._living(cache_salt)
        if len(opened) >= MOST:
            raise Overloaded
        session = Session(str(uuid.uuid4()), time.monotonic() + self.lifetime_s)
        opened[session.id] = session
        return session

    def find(self, session_id: str, cache_salt: str) -> Session:
        """An open session. Raises UnknownSession."""
        try:
            return self._living(cache_salt)[session_id]
        except KeyError:
            raise UnknownSession(session_id) from None

    def close(self, session: Session, cache_salt: str) -> None:
        """End a session before its time."""
        self._living(cache_salt).pop(session.id, None)
        self._bridge.end_session(cache_salt, session.id)

    def _living(self, cache_salt: str) -> dict[str, Session]:
        """The sessions with this salt, of which there are as many as API keys; those that have ended are forgotten."""
        sessions = self._open.setdefault(cache_salt, {})
        now = time.monotonic()
        while sessions and (first := next(iter(sessions.values()))).expires <= now:
            del sessions[first.id]  # the engine ends what it kept for it by itself
        return sessions
