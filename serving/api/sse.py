"""Server-sent events: framing, keep-alive, and how a stream that fails ends.

Knows no dialect.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import msgspec
from flask import Response

from serving.api.errors import Dialect, Internal
from serving.errors import ClientGone, RequestError

log = logging.getLogger(__name__)

KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

T = TypeVar("T")


def event(payload: Any) -> bytes:
    """One event."""
    return b"data: %b\n\n" % msgspec.json.encode(payload)


def begun(items: Iterator[T]) -> Iterator[T]:
    """The same items, with the first one waited for, so that a failure before it is raised here."""
    for first in items:
        return chain((first,), items)
    return iter(())


def guarded(frames: Iterator[bytes], dialect: Dialect, *, farewell: bytes = b"") -> Iterator[bytes]:
    """`frames`; if they fail, an event that says so, and `farewell`."""
    try:
        yield from frames
    except ClientGone:
        return
    except RequestError as error:
        yield event(dialect(error)) + farewell
    except Exception:
        log.exception("a stream failed")
        yield event(dialect(Internal())) + farewell


def response(frames: Iterable[bytes], headers: Mapping[str, str], close: Callable[[], None] | None = None) -> Response:
    """The answer that streams `frames`; `close` is called at its end, however it comes about."""
    answer = Response(frames, headers={**HEADERS, **headers}, content_type="text/event-stream")
    if close is not None:
        answer.call_on_close(close)
    return answer
