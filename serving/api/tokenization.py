"""What prompts are to the model: `/tokenize` and `/chat_tokenize`.

Knows no generation.
"""

import dataclasses
from collections.abc import Iterable

import msgspec
from flask import Response

from serving.api.body import load_as, read_body
from serving.api.inference import Inference
from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.native import ChatTokenizeResponse, GenerateRequest, TokenizePiece
from serving.bridge import Bridge
from serving.validation.validator import Piece, Validator


class Tokenization:
    """The handlers of the routes."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference) -> None:
        self._bridge = bridge
        self._inference = inference

    def tokenize(self) -> Response:
        """`POST /tokenize`."""
        asked = read_body(self._bridge, load_as(GenerateRequest))
        pieces = _shown(self._inference.tokenize(asked.inputs))
        return Response(msgspec.json.encode(pieces), content_type="application/json")

    def chat_tokenize(self) -> Response:
        """`POST /chat_tokenize`."""
        asked = read_body(self._bridge, load_as(ChatRequest))
        syntax = self._bridge.loaded().tool_syntax
        conversation = self._bridge.offload(lambda: asked.conversation(syntax, asked.tool_use()))
        text, pieces = self._inference.tokenize_chat(conversation)
        answer = ChatTokenizeResponse(tokenize_response=_shown(pieces), templated_text=text)
        return Response(msgspec.json.encode(answer), content_type="application/json")


def _shown(pieces: Iterable[Piece]) -> list[TokenizePiece]:
    return [TokenizePiece(*dataclasses.astuple(piece)) for piece in pieces]
