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
    try:
        async with _opened(address) as (reader, writer):
            writer.write(_request("POST", "/generate_stream", address, json.dumps(body).encode(), api_key))
            await _read_events(reader, stream)
    except (OSError, EOFError, ValueError) as error:
        stream.error = f"{type(error).__name__}: {error}"
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


async def _read_events(reader: asyncio.StreamReader, stream: Stream) -> None:
    status, head = await _head(reader)
    pieces = _chunks(reader) if b"transfer-encoding: chunked" in head else _reads(reader)
    pending = b""
    async for piece in pieces:
        now = time.perf_counter()
        *events, pending = (pending + piece).split(b"\n\n")
        for event in events:
            if event.startswith((b'data: {"error"', b'data:{"error"')):
                stream.error = event.decode(errors="replace")
            elif event.startswith(b"data:"):
                stream.arrivals.append(now)
    if status != 200:
        stream.error = f"status {status}: {pending.decode(errors='replace')[:200]}"
    elif stream.error is None and not stream.arrivals:
        stream.error = "the stream ended without a token"


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a body (RFC 9112, section 7.1); trailers are not read."""
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _reads(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece
