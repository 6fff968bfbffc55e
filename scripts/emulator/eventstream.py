"""The binary event stream of InvokeEndpointWithResponseStream: frames, and where a payload is cut into them.

Knows neither HTTP nor the container. Framing: https://smithy.io/2.0/aws/amazon-eventstream.html
"""

import json
import random
import struct
import zlib
from collections.abc import Iterator, Mapping

CONTENT_TYPE = "application/vnd.amazon.eventstream"
STRING = 7  # a header's value type
TRAILER_BYTES = 4
PRELUDE_BYTES = 12


def message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """One frame: lengths, their checksum, headers, payload, checksum of all that."""
    block = b"".join(_header(name, value) for name, value in headers.items())
    lengths = struct.pack(">II", PRELUDE_BYTES + len(block) + len(payload) + TRAILER_BYTES, len(block))
    framed = lengths + struct.pack(">I", zlib.crc32(lengths)) + block + payload
    return framed + struct.pack(">I", zlib.crc32(framed))


def _header(name: str, value: str) -> bytes:
    key, text = name.encode(), value.encode()
    return struct.pack(">B", len(key)) + key + struct.pack(">BH", STRING, len(text)) + text


def payload_part(data: bytes) -> bytes:
    """A frame that carries some of the answer."""
    kind = {":event-type": "PayloadPart", ":content-type": "application/octet-stream", ":message-type": "event"}
    return message(kind, data)


def failure(kind: str, text: str, error_code: str | None = None) -> bytes:
    """A frame that botocore raises as an EventStreamError.

    Args:
        kind: ModelStreamError or InternalStreamFailure.
        text: the message.
        error_code: ModelInvocationTimeExceeded or StreamBroken, of a ModelStreamError.
    """
    body = {"Message": text} if error_code is None else {"Message": text, "ErrorCode": error_code}
    headers = {":exception-type": kind, ":content-type": "application/json", ":message-type": "exception"}
    return message(headers, json.dumps(body).encode())


class Cutter:
    """Cuts what the container wrote where no client may expect it: within lines, events and characters.

    The platform promises nothing about where a part ends. Nothing is held back, so that a token is not delayed.

    Args:
        seed: the same seed cuts the same bytes at the same places.
        largest: bytes in a part; 0 leaves parts as they were read.
    """

    def __init__(self, seed: int, largest: int) -> None:
        self._draw = random.Random(seed)
        self._largest = largest

    def cut(self, data: bytes) -> Iterator[bytes]:
        """The same bytes in parts of 1 to `largest`."""
        if not self._largest:
            yield data
            return
        start = 0
        while start < len(data):
            end = start + self._draw.randint(1, self._largest)
            yield data[start:end]
            start = end
