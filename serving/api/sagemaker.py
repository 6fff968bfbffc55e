"""SageMaker's one door, `/invocations`: type and shape of the body say which dialect it speaks, headers the rest.

Knows no dialect's fields.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

import msgspec
import pydantic
from flask import Response, g, request

from serving.api import json_lines
from serving.api.adapters import AdapterRoutes
from serving.api.body import TYPE_PREFIX, parse, read_any, read_body
from serving.api.chat import Chat
from serving.api.completions import Completions
from serving.api.errors import OPENAI_PATHS, PLAIN_TEXT, Dialect, Refusal, native_body, openai_body, speak_openai
from serving.api.generation import Generation
from serving.api.headers import CUT
from serving.api.native import Native
from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.completions import CompletionRequest
from serving.api.schemas.native import CompatGenerateRequest
from serving.api.schemas.sagemaker import ExecutionParameters, SessionRequest, Status
from serving.api.sessions import Sessions
from serving.bridge import Bridge
from serving.errors import UnknownRoute, UnknownSession
from serving.protocol import Session
from serving.settings import Settings
from serving.validation.validator import Validator

NO_SHAPE = "data did not match any variant of untagged enum SagemakerRequest"
NO_LINES = "the body holds no line"
NOT_UTF_8 = "Failed to buffer the request body: invalid UTF-8"

SESSION = "x-amzn-sagemaker-session-id"
NEW_SESSION = "x-amzn-sagemaker-new-session-id"
CLOSED_SESSION = "x-amzn-sagemaker-closed-session-id"
ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
NEW = "NEW_SESSION"  # in place of a session's id

TRANSFORM_MB = 100  # that a batch transform may have under way, in payloads
SHAPES = (CompatGenerateRequest, ChatRequest, CompletionRequest)

Asked = CompatGenerateRequest | ChatRequest | CompletionRequest
View = Callable[[], Response]


class SageMaker:
    """The handlers of SageMaker's routes.

    Args:
        routes: the other routes for work, by path; a header may lead to them.
    """

    def __init__(
        self,
        *,
        bridge: Bridge[Validator],
        settings: Settings,
        native: Native,
        chat: Chat,
        completions: Completions,
        adapters: AdapterRoutes,
        routes: Mapping[str, View],
    ) -> None:
        self._bridge = bridge
        self._settings = settings
        self._native = native
        self._chat = chat
        self._completions = completions
        self._adapters = adapters
        self._routes = routes
        self._sessions = Sessions(bridge, settings.session_lifetime)

    def invocations(self) -> Response:
        """`POST /invocations`.

        Raises:
            AdapterNotFound, UnknownSession, UnknownRoute: a header names what is not there.
        """
        self._adapters.note_named()
        g.session = self._named_session()
        opened = request.headers.get(SESSION) == NEW
        with ExitStack() as on_failure:
            if opened:  # nobody would ever hear of it
                on_failure.callback(self._sessions.close, g.session, g.get("cache_salt", ""))
            response = self._routed() or self._answered()
            if response.status_code < HTTPStatus.BAD_REQUEST:
                on_failure.pop_all()
                if opened and NEW_SESSION not in response.headers:
                    self._tell(response, g.session)
        if CUT in response.headers:  # of our own headers the platform lets only this one through
            response.headers[ATTRIBUTES] = f"cut={response.headers[CUT]}"
        return response

    def execution_parameters(self) -> Response:
        """`GET /execution-parameters`: as many single requests at a time as are decoded together."""
        slots = min(self._settings.max_concurrent_requests, self._bridge.loaded().facts.max_rows)
        payload_mb = min(TRANSFORM_MB, max(1, self._settings.payload_limit // 2**20))
        parameters = ExecutionParameters(min(slots, TRANSFORM_MB // payload_mb), "SINGLE_RECORD", payload_mb)
        return Response(msgspec.json.encode(parameters), content_type="application/json")

    def _answered(self) -> Response:
        if request.mimetype in json_lines.CONTENT_TYPES:
            return self._answer_lines()
        if request.mimetype == "text/plain":
            asked: Asked | SessionRequest = read_any(self._bridge, _load_text)
        else:
            asked = read_body(self._bridge, _load)
        if isinstance(asked, SessionRequest):
            return self._change_session(asked)
        accepted = _accepted()
        if "text/event-stream" in accepted and "application/json" not in accepted and "stream" not in _said(asked):
            asked = asked.model_copy(update={"stream": True})
        if asked.stream or "text/plain" not in accepted:
            return self._answer(asked)
        return _text_alone(self._answer(_without_prompt(asked)))

    def _answer(self, asked: Asked) -> Response:
        if isinstance(asked, CompatGenerateRequest):
            return self._native.answer(asked)
        speak_openai()
        if isinstance(asked, ChatRequest):
            return self._chat.answer(asked)
        return self._completions.answer(asked)

    def _answer_lines(self) -> Response:
        lines = read_any(self._bridge, json_lines.split)
        if not lines:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, TYPE_PREFIX + NO_LINES)
        asked = self._bridge.offload(_load_lines, lines)  # many, however short they are
        answers = json_lines.JSONLines[Asked](self._begin, _dialect_of).answered(asked)
        return Response(b"".join(answer + b"\n" for answer in answers), content_type=json_lines.CONTENT_TYPES[0])

    def _begin(self, asked: Asked) -> tuple[Generation, Callable[[], Response]]:
        if isinstance(asked, CompatGenerateRequest):
            return self._native.begin_whole(asked)
        if isinstance(asked, ChatRequest):
            return self._chat.begin_whole(asked)
        return self._completions.begin_whole(asked)

    def _routed(self) -> Response | None:
        """The answer of the route that the client's attributes name, if they name one."""
        path = _route_in(request.headers.get(ATTRIBUTES, ""))
        if path is None:
            return None
        if path not in self._routes:
            raise UnknownRoute(path, self._routes)
        if path.startswith(OPENAI_PATHS):
            speak_openai()
        return self._routes[path]()

    def _named_session(self) -> Session | None:
        """The session that the client named, or a new one if it asked for that."""
        given = request.headers.get(SESSION)
        if not given:
            return None
        salt = g.get("cache_salt", "")
        return self._sessions.open(salt) if given == NEW else self._sessions.find(given, salt)

    def _change_session(self, asked: SessionRequest) -> Response:
        salt = g.get("cache_salt", "")
        new = request.headers.get(SESSION) == NEW
        session: Session | None = g.session
        if asked.requestType == "NEW_SESSION":
            session = session if new and session is not None else self._sessions.open(salt)
            response = _status(f"Session {session.id} created")
            self._tell(response, session)
            return response
        if session is None or new:
            raise UnknownSession("")
        self._sessions.close(session, salt)
        response = _status(f"Session {session.id} closed")
        response.headers[CLOSED_SESSION] = session.id
        return response

    def _tell(self, response: Response, session: Session) -> None:
        """AWS's own containers spell the header in two ways; both are sent."""
        expires = datetime.now(UTC) + timedelta(seconds=self._sessions.lifetime_s)
        for name in (SESSION, NEW_SESSION):
            response.headers[name] = f"{session.id}; Expires={expires:%Y-%m-%dT%H:%M:%SZ}"


def _status(status: str) -> Response:
    return Response(msgspec.json.encode(Status(status)), content_type="application/json")


def _load(body: bytes) -> Asked | SessionRequest:
    """The body as the first of the shapes that it fits."""
    value = parse(body)
    for shape in (*SHAPES, SessionRequest):
        with suppress(pydantic.ValidationError):
            return shape.model_validate(value)
    raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, TYPE_PREFIX + NO_SHAPE)


def _load_text(body: bytes) -> CompatGenerateRequest:
    try:
        return CompatGenerateRequest(inputs=body.decode())
    except UnicodeDecodeError:
        raise Refusal(HTTPStatus.BAD_REQUEST, NOT_UTF_8) from None


def _load_lines(lines: Sequence[bytes]) -> list[Asked | Refusal]:
    return [_load_line(line) for line in lines]


def _load_line(line: bytes) -> Asked | Refusal:
    try:
        asked = _load(line)
    except Refusal as refusal:
        return refusal
    if isinstance(asked, SessionRequest):
        return Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, TYPE_PREFIX + NO_SHAPE)
    return asked


def _dialect_of(asked: Asked) -> Dialect:
    return native_body if isinstance(asked, CompatGenerateRequest) else openai_body


def _said(asked: Asked) -> set[str]:
    return asked.model_fields_set


def _accepted() -> set[str]:
    """The content types that the client names; wildcards name none."""
    return {kind.partition(";")[0].strip().lower() for kind, quality in request.accept_mimetypes if quality > 0}


def _without_prompt(asked: Asked) -> Asked:
    """The same for an answer without the prompt before it, unless it was asked for."""
    if not isinstance(asked, CompatGenerateRequest) or asked.parameters.return_full_text is not None:
        return asked
    return asked.model_copy(update={"parameters": asked.parameters.model_copy(update={"return_full_text": False})})


def _text_alone(response: Response) -> Response:
    """The first answer's text, with the headers of the whole answer."""
    whole = msgspec.json.decode(response.get_data())
    if isinstance(whole, list):
        text = whole[0]["generated_text"]
    else:
        choice = whole["choices"][0]
        text = choice["message"].get("content", "") if "message" in choice else choice["text"]
    response.set_data(text)
    response.content_type = PLAIN_TEXT
    return response


def _route_in(attributes: str) -> str | None:
    """The path in `route=/path`, among other attributes or alone."""
    for attribute in attributes.replace(";", ",").split(","):
        name, _, value = attribute.partition("=")
        if name.strip().lower() == "route":
            return value.strip()
    return None
