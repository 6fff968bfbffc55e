"""SageMaker's one door, `/invocations`: the shape of the body says which dialect it speaks.

Knows no dialect's fields.
"""

from contextlib import suppress
from http import HTTPStatus

import pydantic
from flask import Response

from serving.api.body import TYPE_PREFIX, parse, read_body
from serving.api.chat import Chat
from serving.api.completions import Completions
from serving.api.errors import Refusal, speak_openai
from serving.api.native import Native
from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.completions import CompletionRequest
from serving.api.schemas.native import CompatGenerateRequest
from serving.bridge import Bridge
from serving.validation.validator import Validator

NO_SHAPE = "data did not match any variant of untagged enum SagemakerRequest"


class SageMaker:
    """The handler of SageMaker's route."""

    def __init__(self, bridge: Bridge[Validator], native: Native, chat: Chat, completions: Completions) -> None:
        self._bridge = bridge
        self._native = native
        self._chat = chat
        self._completions = completions

    def invocations(self) -> Response:
        """`POST /invocations`."""
        asked = read_body(self._bridge, _load)
        if isinstance(asked, CompatGenerateRequest):
            return self._native.answer(asked)
        speak_openai()
        if isinstance(asked, ChatRequest):
            return self._chat.answer(asked)
        return self._completions.answer(asked)


def _load(body: bytes) -> CompatGenerateRequest | ChatRequest | CompletionRequest:
    """The body as the first of the shapes that it fits."""
    value = parse(body)
    with suppress(pydantic.ValidationError):
        return CompatGenerateRequest.model_validate(value)
    with suppress(pydantic.ValidationError):
        return ChatRequest.model_validate(value)
    with suppress(pydantic.ValidationError):
        return CompletionRequest.model_validate(value)
    raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, TYPE_PREFIX + NO_SHAPE)
