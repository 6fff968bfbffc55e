"""What an error becomes on the wire: its status, and its body in each dialect. The only place that knows a status.

Knows no route.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType

import msgspec
from flask import Response, g, request

from serving.api.schemas import native, openai
from serving.errors import RequestError, Unavailable

OPENAI_PATHS = "/v1/"
PLAIN_TEXT = "text/plain; charset=utf-8"
CLIENT_CLOSED_REQUEST = 499  # nginx's number for it; nobody reads the answer

STATUSES = MappingProxyType(
    {
        "unauthorized": HTTPStatus.UNAUTHORIZED,
        "model_not_found": HTTPStatus.NOT_FOUND,
        "unknown_session": HTTPStatus.BAD_REQUEST,
        "unknown_route": HTTPStatus.NOT_FOUND,
        "adapter_not_found": HTTPStatus.NOT_FOUND,
        "adapters_unsupported": HTTPStatus.FAILED_DEPENDENCY,  # as AWS's own containers answer when loading fails
        "adapter_refused": HTTPStatus.FAILED_DEPENDENCY,
        "adapter_conflict": HTTPStatus.CONFLICT,
        "no_room_for_adapter": HTTPStatus.INSUFFICIENT_STORAGE,
        "validation": HTTPStatus.UNPROCESSABLE_ENTITY,
        "Input validation error": HTTPStatus.UNPROCESSABLE_ENTITY,
        "suffix not supported": HTTPStatus.UNPROCESSABLE_ENTITY,
        "batch size exceeded": HTTPStatus.UNPROCESSABLE_ENTITY,
        "template_error": HTTPStatus.UNPROCESSABLE_ENTITY,
        "tool_error": HTTPStatus.UNPROCESSABLE_ENTITY,
        "generation": HTTPStatus.FAILED_DEPENDENCY,
        "overloaded": HTTPStatus.TOO_MANY_REQUESTS,
        "healthcheck": HTTPStatus.SERVICE_UNAVAILABLE,
        "not_ready": HTTPStatus.SERVICE_UNAVAILABLE,
        "shutting_down": HTTPStatus.SERVICE_UNAVAILABLE,
        "incomplete_generation": HTTPStatus.INTERNAL_SERVER_ERROR,
        "incomplete_generation_stream": HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
    }
)

# OpenAI's `type` by status; what is not here is the server's fault.
OPENAI_TYPES = MappingProxyType(
    {
        HTTPStatus.BAD_REQUEST: "invalid_request_error",
        HTTPStatus.UNAUTHORIZED: "authentication_error",
        HTTPStatus.NOT_FOUND: "invalid_request_error",
        HTTPStatus.UNPROCESSABLE_ENTITY: "invalid_request_error",
        HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    }
)

# OpenAI's `param` and `code`, where it has them.
OPENAI_CODES: Mapping[str, tuple[str | None, str]] = MappingProxyType(
    {"unauthorized": (None, "invalid_api_key"), "model_not_found": ("model", "model_not_found")}
)

Body = native.ErrorBody | openai.ErrorBody
Dialect = Callable[[RequestError], Body]


class Unauthorized(RequestError):
    """The request bears no key, or a wrong one."""

    error_type = "unauthorized"

    def __init__(self) -> None:
        super().__init__("Invalid or missing API key")


class Internal(RequestError):
    """A fault of the server's own; what it was is in the log."""

    error_type = "internal"

    def __init__(self) -> None:
        super().__init__("Internal server error")


class Refusal(Exception):
    """A request that no handler has seen: its body cannot be read as what the route takes. The answer is plain text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def status_of(error: RequestError) -> HTTPStatus:
    """The status of an answer that consists of this error."""
    return STATUSES[error.error_type]


def native_body(error: RequestError) -> Body:
    """The error in TGI's words."""
    return native.ErrorBody(error=str(error), error_type=error.error_type)


def openai_body(error: RequestError) -> Body:
    """The error in OpenAI's words, with TGI's type beside them."""
    kind = OPENAI_TYPES.get(status_of(error), "server_error")
    param, code = OPENAI_CODES.get(error.error_type, (None, None))
    detail = openai.ErrorDetail(message=str(error), type=kind, param=param, code=code)
    return openai.ErrorBody(error=detail, error_type=error.error_type)


def dialect() -> Dialect:
    """The one that the current request is answered in: its path's, unless its body said otherwise."""
    return openai_body if g.get("openai", request.path.startswith(OPENAI_PATHS)) else native_body


def speak_openai() -> None:
    """Answer the current request in OpenAI's dialect, whatever its path."""
    g.openai = True


def answer(error: RequestError, dialect: Dialect) -> Response:
    """The whole answer for an error."""
    response = Response(msgspec.json.encode(dialect(error)), status_of(error), content_type="application/json")
    if isinstance(error, Unavailable):
        response.headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        response.headers["www-authenticate"] = "Bearer"
    return response


def answer_refusal(refusal: Refusal) -> Response:
    """The whole answer for a body that could not be read."""
    return Response(refusal.text, refusal.status, content_type=PLAIN_TEXT)


def empty(status: int) -> Response:
    """An answer without a body."""
    response = Response(status=status)
    del response.headers["content-type"]
    return response
