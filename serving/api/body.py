"""The body of a request, mostly JSON: read within its limit, parsed strictly, and made what the route takes.

Knows no route and no field.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import pydantic
from flask import request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge

from serving.api.errors import Refusal
from serving.api.schemas.strict import RepeatedKeys, StrictModel
from serving.bridge import Bridge
from serving.nesting import is_deeper

LONG_BODY = 16_384  # bytes, from which on parsing would hold up the hub
MAX_DEPTH = 128  # of objects and arrays in each other; the original's parser has the same
TYPE_PREFIX = "Failed to deserialize the JSON body into the target type: "

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

M = TypeVar("M", bound=StrictModel)
T = TypeVar("T")


def read_body(bridge: Bridge[Any], load: Callable[[bytes], T]) -> T:
    """What `load` makes of the current request's body, which has to be said to be JSON.

    Raises:
        Refusal: it is no JSON, too long, or not what `load` takes.
    """
    kind, _, subtype = request.mimetype.partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected request with `Content-Type: application/json`")
    return read_any(bridge, load)


def read_any(bridge: Bridge[Any], load: Callable[[bytes], T]) -> T:
    """What `load` makes of the current request's body, whatever it is said to be.

    Raises:
        Refusal: it is too long, or not what `load` takes.
    """
    try:
        body = request.get_data(cache=False)
        if len(body) == request.max_content_length:  # a chunked body is cut there without a word
            raise RequestEntityTooLarge
    except RequestEntityTooLarge as error:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Failed to buffer the request body: length limit exceeded"
        ) from error
    except BadRequest as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "Failed to buffer the request body: it ended too soon") from error
    except ParseException as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "Failed to buffer the request body: its chunks are malformed") from error
    return bridge.offload(load, body) if len(body) > LONG_BODY else load(body)


def load_as(model: type[M]) -> Callable[[bytes], M]:
    """A `load` for bodies of one kind."""

    def load(body: bytes) -> M:
        return fit(model, parse(body), TYPE_PREFIX)

    return load


def fit(model: type[M], value: Any, prefix: str) -> M:
    """A value as one kind of body. Raises Refusal, with words that begin with `prefix`."""
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, prefix + _described(error)) from error


def parse(body: bytes) -> Any:
    """The JSON value of a body; objects that repeat a key are `RepeatedKeys`.

    Raises:
        Refusal: it is no JSON, or nothing that could be written as UTF-8 again.
    """
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
        if is_deeper(
            value, MAX_DEPTH
        ):  # it would run into a recursion limit later, in a validator, a template or an encoder
            raise RecursionError
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at line {error.lineno} column {error.colno}"
    except UnicodeDecodeError:
        detail = "invalid UTF-8"
    except UnicodeEncodeError:
        detail = "lone surrogate in a string"
    except RecursionError:
        detail = "recursion limit exceeded"
    except ValueError:  # a constant such as NaN, or an integer of thousands of digits
        detail = "invalid number"
    else:
        return value
    raise Refusal(HTTPStatus.BAD_REQUEST, f"Failed to parse the request body as JSON: {detail}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    counts = Counter(key for key, _ in pairs)
    return RepeatedKeys(pairs, frozenset(key for key, count in counts.items() if count > 1))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _described(error: pydantic.ValidationError) -> str:
    """The first fault, with the path to it, in the manner of the original's messages."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = first["loc"]
    fault = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        fault, place = f"missing field `{place[-1]}`", place[:-1]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    return f"{path}: {fault}" if path else fault
