"""What of a container's answer reaches the client, in each of the API's forms.

Knows no route; the exchange is given to it.
"""

import uuid
from collections.abc import Iterator, Mapping

from flask import Response

from scripts.emulator.admission import ATTRIBUTES, CONTENT_TYPE, visible
from scripts.emulator.errors import VARIANT, ServiceError
from scripts.emulator.eventstream import Cutter, failure, payload_part
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.sessions import CLOSED, NEW, SESSION
from scripts.emulator.upstream import ClientGone, Exchange, Expired, UpstreamError

LINES = ("text/event-stream", "application/jsonlines", "application/x-ndjson")
# Of the connection, or told to the client in another form.
TOLD_OTHERWISE = {
    "connection", "keep-alive", "transfer-encoding", "content-length", "date", "server", "content-type",
    SESSION.lower(), NEW.lower(), CLOSED.lower(),
}  # fmt: skip
INTERNAL_STREAM_FAILURE = (
    "The stream processing failed because of an unknown error, exception or failure. Try your request again."
)


class Answers:
    """Turns containers' answers into the platform's.

    Args:
        limits: the platform's.
        journal: gets told what is lost on the way, once a header.
    """

    def __init__(self, limits: Limits, journal: Journal) -> None:
        self._limits = limits
        self._journal = journal
        self._told: set[str] = set()

    def headers(self, answer: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, str]:
        """The headers of an answer that is not a stream.

        Args:
            answer: the container's headers.
            kept: of the session.
        """
        found = {"x-Amzn-Invoked-Production-Variant": VARIANT, "x-amzn-RequestId": str(uuid.uuid4()), **kept}
        attributes = answer.get(ATTRIBUTES)
        if attributes is not None and visible(attributes, self._limits):
            found[ATTRIBUTES] = attributes
        elif attributes is not None:
            self._journal.blame(
                f"the answer's {ATTRIBUTES} is dropped: at most {self._limits.attribute_characters} visible ASCII "
                "characters"
            )
        self._tell_stripped(answer, found)
        return found

    def whole(self, body: bytes, answer: Mapping[str, str], kept: Mapping[str, str]) -> Response:
        """InvokeEndpoint's answer."""
        return typed(Response(body, headers=self.headers(answer, kept)), answer.get("Content-Type"))

    def frames(self, exchange: Exchange, cutter: Cutter, break_after: int | None) -> Iterator[bytes]:
        """The event stream of an answer.

        Args:
            exchange: that has begun; it is closed at the end.
            cutter: decides where parts end.
            break_after: so many parts, after which the platform itself fails; None never.
        """
        last = b""
        sent = 0
        try:
            with exchange:
                for data in exchange.parts():
                    for part in cutter.cut(data):
                        if sent == break_after:
                            yield failure("InternalStreamFailure", INTERNAL_STREAM_FAILURE)
                            return
                        yield payload_part(part)
                        sent += 1
                    last = data[-1:]
                self._demand_newline(exchange, last)
        except ClientGone:
            self._journal.say("the client hung up; so did we")
        except Expired as error:
            text = (
                f"The model container did not complete sending the inference response in the allotted time ({error})."
            )
            self._journal.say(text)
            yield failure("ModelStreamError", text, "ModelInvocationTimeExceeded")
        except UpstreamError as error:
            text = f"The connection to the model container was reset or closed ({error})."
            self._journal.say(text)
            yield failure("ModelStreamError", text, "StreamBroken")
        except Exception as error:
            self._journal.say(f"the emulator failed in a stream: {error!r}")
            yield failure("InternalStreamFailure", INTERNAL_STREAM_FAILURE)

    def _demand_newline(self, exchange: Exchange, last: bytes) -> None:
        kind = exchange.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind in LINES and last not in (b"", b"\n"):
            self._journal.blame("a stream of lines ended without a newline: line iterators of the SDK wait for ever")

    def _tell_stripped(self, answer: Mapping[str, str], kept: Mapping[str, str]) -> None:
        passed = {name.lower() for name in (*kept, CONTENT_TYPE)}
        lost = {name.lower() for name in answer} - passed - TOLD_OTHERWISE - self._told
        if lost:
            self._told |= lost
            self._journal.advise(f"headers of the answer that do not reach the client: {', '.join(sorted(lost))}")


def typed(response: Response, content_type: str | None) -> Response:
    """The container's content type, byte for byte, or none where it gave none."""
    response.headers.remove("Content-Type")
    if content_type is not None:
        response.headers["Content-Type"] = content_type
    return response


def refused(error: ServiceError) -> Response:
    """An error as botocore reads it."""
    response = Response(error.body(), error.status, {"x-amzn-RequestId": str(uuid.uuid4())})
    if error.code is not None:
        response.headers["x-amzn-ErrorType"] = error.code
    return typed(response, "application/json")
