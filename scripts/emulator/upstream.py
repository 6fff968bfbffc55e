"""One request to a container, watched: its deadline, and whether the client is still there.

Knows no API of SageMaker's and no error of it.
"""

import contextlib
import http.client
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import urllib3.connection
import urllib3.exceptions
from urllib3.util import SKIP_HEADER

READ_BYTES = 65536
UNREADABLE = (http.client.HTTPException, urllib3.exceptions.HTTPError, OSError, AttributeError)
# urllib3 would add these; the platform does not.
NOT_ADDED = {"User-Agent": SKIP_HEADER, "Accept-Encoding": SKIP_HEADER}


class UpstreamError(Exception):
    """No answer, or not the whole of it."""


class Unreachable(UpstreamError):
    """The container took no connection in time."""


class Broken(UpstreamError):
    """The connection ended before the answer did."""


class Expired(UpstreamError):
    """Time was up."""


class ClientGone(UpstreamError):
    """The client hung up, and so did we."""


class TooLarge(UpstreamError):
    """The answer is longer than allowed."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a container listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Exchange:
    """A request that has been sent and an answer that has begun; a context that hangs up at its end.

    Losing it hangs up too: a server whose client resets the connection may drop its answer without closing it.

    Args:
        address: the container's.
        path: of the request, which is a POST.
        headers: what reaches the container, and nothing else.
        body: byte for byte.
        connect_timeout_s: for the container to accept.
        deadline_s: for the whole answer.
        client: its connection; when it ends, ours does.

    Attributes:
        status: of the answer.
        headers: of the answer.

    Raises:
        Unreachable, Broken, Expired, ClientGone: before the answer's head was complete.
    """

    def __init__(
        self,
        address: Address,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        connect_timeout_s: float,
        deadline_s: float,
        client: socket.socket | None,
    ) -> None:
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            connection = _connect(address, connect_timeout_s)
            opened.callback(connection.close)
            assert connection.sock is not None
            self._watch = _Watch(connection.sock, client, deadline_s)
            opened.callback(self._watch.end)
            try:
                connection.request(
                    "POST", path, body, {**NOT_ADDED, **headers}, preload_content=False, decode_content=False
                )
                self._answer = connection.getresponse()
            except UNREADABLE as error:
                raise self._reason(error) from error
            opened.callback(self._answer.close)
            self._open = opened.pop_all()
        self.status = self._answer.status
        self.headers: Mapping[str, str] = self._answer.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. May be called again."""
        self._open.close()

    def parts(self) -> Iterator[bytes]:
        """The answer's body as it comes.

        Raises:
            Broken, Expired, ClientGone: before its end.
        """
        while True:
            try:
                data = self._answer.read1(READ_BYTES)
            except UNREADABLE as error:
                raise self._reason(error) from error
            if self._watch.cause is not None:
                raise self._watch.cause
            if not data:
                return
            yield data

    def whole(self, largest: int) -> bytes:
        """The whole body. Raises as `parts` does, and TooLarge beyond that many bytes."""
        body = bytearray()
        for data in self.parts():
            body += data
            if len(body) > largest:
                raise TooLarge(f"more than {largest} bytes")
        return bytes(body)

    def _reason(self, error: Exception) -> UpstreamError:
        return self._watch.cause or Broken(f"{type(error).__name__}: {error}")


def _connect(address: Address, timeout_s: float) -> urllib3.connection.HTTPConnection:
    connection = urllib3.connection.HTTPConnection(address.host, address.port, timeout=timeout_s)
    try:
        connection.connect()
    except (urllib3.exceptions.HTTPError, OSError) as error:
        connection.close()
        reason = error.__cause__ or error
        raise Unreachable(f"no connection to {address} within {timeout_s * 1000:.0f} ms: {reason}") from error
    assert connection.sock is not None
    connection.sock.settimeout(None)  # from here on the watch keeps time
    connection.timeout = None
    return connection


class _Watch:
    """A thread that cuts the connection to the container when time is up or the client has gone; it begins at once.

    It holds this and not the exchange, so that a lost exchange can end it.

    Attributes:
        cause: why it did; None as long as it has not.
    """

    def __init__(self, upstream: socket.socket, client: socket.socket | None, seconds: float) -> None:
        self.cause: UpstreamError | None = None
        self._upstream = upstream
        self._client = client
        self._seconds = seconds
        self._bell, self._rope = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def end(self) -> None:
        """Stop watching. May be called again, and from any thread: the collector of garbage runs in any."""
        self._rope.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _close(self) -> None:
        self._rope.close()
        self._bell.close()

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            self._close()

    def _watch(self) -> None:
        deadline = time.monotonic() + self._seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            if self._client is not None:
                selector.register(self._client, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(max(deadline - time.monotonic(), 0))]
                if self._bell in ready:
                    return
                if not ready:
                    self.cause = Expired(f"not finished after {self._seconds:g} s")
                    break
                assert self._client is not None
                if _has_ended(self._client):
                    self.cause = ClientGone("the client hung up")
                    break
                selector.unregister(self._client)  # it sends on; that it ends later cannot be seen behind those bytes
        with contextlib.suppress(OSError):
            self._upstream.shutdown(socket.SHUT_RDWR)


def _has_ended(client: socket.socket) -> bool:
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
