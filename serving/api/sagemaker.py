"""SageMaker's one door, `/invocations`: the shape of the body says which dialect it speaks.

Knows no dialect's fields.
"""

from http import HTTPStatus

import pydantic
from flask import Response

from serving.api.body import TYPE_PREFIX, parse, read_body
from serving.api.chat import Chat
from serving.api.errors import Refusal
from serving.api.native import Native
from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.native import CompatGenerateRequest
from serving.bridge import Bridge
from serving.validation.validator import Validator

NO_SHAPE = "data did not match any variant of untagged enum SagemakerRequest"


class SageMaker:
    """The handler of SageMaker's route."""

    def __init__(self, bridge: Bridge[Validator], native: Native, chat: Chat) -> None:
        self._bridge = bridge
        self._native = native
        self._chat = chat

    def invocations(self) -> Response:
        """`POST /invocations`."""
        asked = read_body(self._bridge, _load)
        if isinstance(asked, ChatRequest):
            return self._chat.answer(asked)
        return self._native.answer(asked)


def _load(body: bytes) -> CompatGenerateRequest | ChatRequest:
    value = parse(body)
    try:
        return CompatGenerateRequest.model_validate(value)
    except pydantic.ValidationError:
        pass
    try:
        return ChatRequest.model_validate(value)
    except pydantic.ValidationError as error:
        raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, TYPE_PREFIX + NO_SHAPE) from error
