"""The routes of SageMaker's runtime: InvokeEndpoint in its three forms, the OpenAI path, and the emulator's own state.

Knows how calls are answered, not how containers live.
"""

import itertools
import json
import socket
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from scripts.emulator.admission import (
    CONTENT_TYPE,
    FAMILY,
    INFERENCE_ID,
    Offer,
    Operation,
    admit,
    body_of,
    component_headers,
)
from scripts.emulator.answers import Answers, refused, typed
from scripts.emulator.asynchronous import AsyncQueue, Job
from scripts.emulator.errors import ServiceError, invalid, model_error
from scripts.emulator.eventstream import CONTENT_TYPE as EVENT_STREAM
from scripts.emulator.eventstream import Cutter
from scripts.emulator.fleet import Fleet
from scripts.emulator.journal import Journal
from scripts.emulator.sessions import SESSION
from scripts.emulator.tokens import token_trouble
from scripts.emulator.upstream import ClientGone, Exchange, Expired, UpstreamError

CLIENT_CLOSED_REQUEST = 499  # nobody reads it
CHAT = "/v1/chat/completions"
OPERATIONS = (
    "POST /endpoints/NAME/invocations, /invocations-response-stream, /async-invocations and "
    "/openai/v1/chat/completions. Calls such as CreateEndpoint belong to another service: point boto3.client"
    "('sagemaker') elsewhere (moto has a server for it)."
)


class RuntimeApi:
    """The handlers.

    Args:
        fleet: that answers.
        queue: of asynchronous calls.
        offer: what can be called.
        journal: gets told.
        seed: of where streams are cut.
        largest_part: of a stream, in bytes; 0 leaves parts as they come.
        break_streams_after: parts; None never.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: AsyncQueue,
        offer: Offer,
        journal: Journal,
        *,
        seed: int,
        largest_part: int,
        break_streams_after: int | None,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._offer = offer
        self._journal = journal
        self._limits = fleet.limits
        self._answers = Answers(fleet.limits, journal)
        self._seeds = itertools.count(seed)
        self._largest_part = largest_part
        self._break_after = break_streams_after

    def application(self) -> Flask:
        """The WSGI application."""
        app = Flask(__name__)
        post = ["POST"]
        app.add_url_rule("/endpoints/<endpoint>/invocations", view_func=self.invoke, methods=post)
        app.add_url_rule("/endpoints/<endpoint>/invocations-response-stream", view_func=self.stream, methods=post)
        app.add_url_rule("/endpoints/<endpoint>/async-invocations", view_func=self.invoke_async, methods=post)
        path = "/endpoints/<endpoint>{}/openai/<path:path>"
        for number, component in enumerate(("", "/inference-components/<component>")):
            app.add_url_rule(path.format(component), f"openai{number}", self.openai, methods=["GET", *post])
        app.add_url_rule("/_emulator/status", view_func=self.status, methods=["GET"])
        app.register_error_handler(ServiceError, _show)
        app.register_error_handler(HTTPException, _unknown)
        app.register_error_handler(Exception, self._fault)
        return app

    def invoke(self, endpoint: str) -> Response:
        """`InvokeEndpoint`."""
        headers = admit(request, endpoint, Operation.INVOKE, self._offer, self._limits)
        body = body_of(request, self._limits.payload_bytes)
        asked = request.headers.get(SESSION)
        instance = self._fleet.route(asked)
        try:
            with self._fleet.send(
                instance, headers, body, deadline_s=self._limits.invoke_s, client=_client()
            ) as exchange:
                answer = self._whole_of(exchange)
        except UpstreamError as error:
            return self._none(error)
        return self._answers.whole(
            answer, exchange.headers, self._fleet.sessions.note(asked, exchange.headers, instance)
        )

    def stream(self, endpoint: str) -> Response:
        """`InvokeEndpointWithResponseStream`."""
        headers = admit(request, endpoint, Operation.STREAM, self._offer, self._limits)
        body = body_of(request, self._limits.payload_bytes)
        instance = self._fleet.route(request.headers.get(SESSION))
        try:
            exchange = self._fleet.send(instance, headers, body, deadline_s=self._limits.stream_s, client=_client())
            if exchange.status >= HTTPStatus.MULTIPLE_CHOICES:
                with exchange:
                    self._whole_of(exchange)
        except UpstreamError as error:
            return self._none(error)
        cutter = Cutter(next(self._seeds), self._largest_part)
        told = self._answers.headers(exchange.headers, {})
        if (kind := exchange.headers.get("Content-Type")) is not None:
            told[CONTENT_TYPE] = kind
        response = Response(self._answers.frames(exchange, cutter, self._break_after), headers=told)
        response.call_on_close(exchange.close)
        return typed(response, EVENT_STREAM)

    def invoke_async(self, endpoint: str) -> Response:
        """`InvokeEndpointAsync`."""
        headers = admit(request, endpoint, Operation.ASYNC, self._offer, self._limits)
        body = body_of(request, self._limits.inline_async_bytes)
        source = request.headers.get(FAMILY + "InputLocation")
        if bool(source) == bool(body):
            raise invalid("Provide exactly one of Body and InputLocation.")
        identifier = request.headers.get(INFERENCE_ID) or str(uuid.uuid4())
        ending = request.headers.get(FAMILY + "S3OutputPathExtension", "").strip("/")
        name = uuid.uuid4()
        file = request.headers.get(FAMILY + "Filename") or f"{name}.out"
        job = Job(
            identifier=identifier,
            headers={**headers, INFERENCE_ID.lower(): identifier},
            body=body,
            input_location=source,
            output_location="/".join(filter(None, (self._offer.results, ending, file))),
            failure_location=f"{self._offer.failures}/{name}-error.out",
            ttl_s=self._seconds("RequestTTLSeconds", self._limits.async_ttl_s, 60, 21600),
            timeout_s=self._seconds("InvocationTimeoutSeconds", self._limits.async_s, 1, 3600),
        )
        self._queue.put(job)
        where = {FAMILY + "OutputLocation": job.output_location, FAMILY + "FailureLocation": job.failure_location}
        said = json.dumps({"InferenceId": identifier})
        return typed(Response(said, HTTPStatus.ACCEPTED, where), "application/json")

    def openai(self, endpoint: str, path: str, component: str | None = None) -> Response:
        """The OpenAI-compatible path: the container's own answer, as it is."""
        if trouble := token_trouble(request.headers.get("Authorization"), datetime.now(UTC)):
            raise ServiceError(401, "InvalidToken", trouble)
        if (request.method, f"/{path}") != ("POST", CHAT):
            raise ServiceError(
                404, "UnknownOperation", f"SageMaker routes POST /openai{CHAT} and nothing else below /openai."
            )
        if endpoint != self._offer.endpoint:
            raise invalid(f"Endpoint {endpoint} not found; here there is {self._offer.endpoint}.")
        headers = component_headers(component, self._offer)
        for name in ("Content-Type", "Accept"):
            if name in request.headers:
                headers[name.lower()] = request.headers[name]
        body = body_of(request, self._limits.payload_bytes)
        deadline_s = self._limits.stream_s if _wants_stream(body) else self._limits.invoke_s
        instance = self._fleet.route(None)
        try:
            exchange = self._fleet.send(instance, headers, body, path=CHAT, deadline_s=deadline_s, client=_client())
        except UpstreamError as error:
            return self._none(error)
        response = Response(self._until_broken(exchange), exchange.status)
        response.call_on_close(exchange.close)
        return typed(response, exchange.headers.get("Content-Type"))

    def status(self) -> Response:
        """What the emulator knows; not part of SageMaker."""
        told: dict[str, Any] = {
            "endpoint": self._offer.endpoint,
            "async_endpoint": self._offer.async_endpoint,
            "status": self._fleet.state,
            "instances": [
                {"name": one.name, "status": one.state, "address": str(one.address) if one.address else None}
                for one in self._fleet.instances
            ],
            "invocations": self._fleet.invocations,
            "breaches": self._journal.breaches,
        }
        return typed(Response(json.dumps(told, indent=2) + "\n"), "application/json")

    def _until_broken(self, exchange: Exchange) -> Iterator[bytes]:
        """The body as it is; where the container breaks off, so does the connection to the client."""
        try:
            with exchange:
                yield from exchange.parts()
        except UpstreamError as error:
            self._journal.say(f"an answer on the OpenAI path broke off: {error}")
            raise ConnectionAbortedError(str(error)) from error

    def _whole_of(self, exchange: Exchange) -> bytes:
        """The body of a good answer. Raises ServiceError for another one, UpstreamError for less than all of it."""
        answer = exchange.whole(self._limits.payload_bytes)
        if exchange.status >= HTTPStatus.MULTIPLE_CHOICES:
            raise model_error(self._fleet.name, exchange.status, answer.decode(errors="replace"))
        return answer

    def _none(self, error: UpstreamError) -> Response:
        self._journal.say(f"no answer: {error}")
        if isinstance(error, ClientGone):
            return Response(status=CLIENT_CLOSED_REQUEST)
        if isinstance(error, Expired):
            self._journal.advise(
                f"InvokeEndpoint allows {self._limits.invoke_s:g} s for the whole answer, whatever the client's own "
                "timeout is: stream, ask for fewer tokens, or invoke asynchronously"
            )
        raise self._fleet.no_answer(error)

    def _seconds(self, member: str, default: float, least: int, most: int) -> float:
        """A time that the request gives, scaled as the default is."""
        given = request.headers.get(FAMILY + member)
        if given is None:
            return default
        if not given.isdigit() or not least <= int(given) <= most:
            raise invalid(f"1 validation error detected: {member} must be {least} to {most}")
        return int(given) * self._limits.scale

    def _fault(self, error: Exception) -> Response:
        self._journal.say(f"the emulator failed: {error!r}")
        return _show(ServiceError(500, "InternalFailure", f"The emulator itself failed: {error!r}"))


def _client() -> socket.socket | None:
    found = request.environ.get("werkzeug.socket")
    return found if isinstance(found, socket.socket) else None


def _wants_stream(body: bytes) -> bool:
    try:
        asked = json.loads(body)
    except ValueError:
        return False
    return isinstance(asked, dict) and asked.get("stream") is True


def _show(error: ServiceError) -> Response:
    if "/openai/" not in request.path:
        return refused(error)
    told = {"error": {"message": str(error), "type": error.code, "param": None, "code": error.status}}
    return typed(Response(json.dumps(told), error.status), "application/json")


def _unknown(error: HTTPException) -> Response:
    message = f"{request.method} {request.path} is no operation of SageMaker's runtime. There is {OPERATIONS}"
    return _show(ServiceError(error.code or 404, "UnknownOperationException", message))
