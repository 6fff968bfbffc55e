"""A client cheap enough to share a machine with the server it measures: raw sockets on one event loop.

Knows only what it needs of HTTP and of server-sent events.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Address":
        """From `http://HOST:PORT`. Raises ValueError for anything that is not plain HTTP."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not of the form http://HOST:PORT")
        return cls(parts.hostname, parts.port or 80)


@dataclass(slots=True)
class Stream:
    """One streamed generation, seen from the client.

    Attributes:
        sent: when the request was sent (`time.perf_counter`).
        arrivals: when each token arrived.
        error: what the server said instead of a token, or how the connection ended.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first_token_s(self) -> float:
        """From sending the request; only of streams with tokens."""
        return self.arrivals[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Between neighbouring tokens."""
        return [later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def generate_stream(address: Address, body: dict[str, Any], api_key: str | None = None) -> Stream:
    """`POST /generate_stream`; fails into `Stream.error`, never with an exception of the connection's."""
    stream = Stream(time.perf_counter())
    request = _request("POST", "/generate_stream", address, json.dumps(body).encode(), api_key)
    ended = asyncio.get_running_loop().create_future()
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: _Events(stream, request, ended), address.host, address.port
        )
        await ended
    except OSError as error:
        stream.error = f"{type(error).__name__}: {error}"
    if stream.error is None and not stream.arrivals:
        stream.error = "the stream ended without a token"
    return stream


async def ping(address: Address) -> tuple[float, int]:
    """`GET /ping` on a connection of its own: seconds from connecting to the whole answer, and its status."""
    begun = time.perf_counter()
    async with _opened(address) as (reader, writer):
        writer.write(_request("GET", "/ping", address))
        status, _ = await _head(reader)
        await reader.read()
    return time.perf_counter() - begun, status


@contextlib.asynccontextmanager
async def _opened(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _request(method: str, path: str, address: Address, body: bytes = b"", api_key: str | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address.host}:{address.port}", "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if api_key is not None:
        lines.append(f"Authorization: Bearer {api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The status, and the headers in lower case."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return int(head.split(b" ", 2)[1]), head


class _Events(asyncio.Protocol):
    """Counts the events of a stream as they arrive; whether the body is chunked makes no difference to that.

    A line break inside an event's JSON is escaped, so `data:` after one begins an event wherever it stands.
    """

    def __init__(self, stream: Stream, request: bytes, ended: "asyncio.Future[None]") -> None:
        self._stream, self._request, self._ended = stream, request, ended
        self._tail = b""
        self._status = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the time of every event that begins in `data`."""
        now = time.perf_counter()
        seen = self._tail + data
        self._status = self._status or seen[: seen.find(b"\r\n")]
        if b'\ndata: {"error"' in seen or b" 200 " not in self._status:
            self._stream.error = seen.decode(errors="replace")[-500:]
            self._tail = seen[-500:]
            return
        self._stream.arrivals += [now] * seen.count(b"\ndata:")
        self._tail = seen[seen.rfind(b"\n") :] if len(seen) - seen.rfind(b"\n") < len(b"\ndata:") else b""

    def connection_lost(self, error: Exception | None) -> None:
        """The answer is whole, or will never be."""
        if error is not None:
            self._stream.error = f"{type(error).__name__}: {error}"
        self._ended.set_result(None)
