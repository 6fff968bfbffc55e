"""What prompts are to the model: `/tokenize` and `/chat_tokenize`.

Knows no generation.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
        return self._answer(self._inference.tokenize(asked.inputs), list)

    def chat_tokenize(self) -> Response:
        """`POST /chat_tokenize`."""
        asked = read_body(self._bridge, load_as(ChatRequest))
        syntax = self._bridge.loaded().tool_syntax
        conversation = self._bridge.offload(lambda: asked.conversation(syntax, asked.tool_use()))
        text, pieces = self._inference.tokenize_chat(conversation)
        return self._answer(pieces, lambda shown: ChatTokenizeResponse(tokenize_response=shown, templated_text=text))

    def _answer(self, pieces: Sequence[Piece], around: Callable[[list[TokenizePiece]], Any]) -> Response:
        def write() -> bytes:
            shown = [TokenizePiece(piece.id, piece.text, piece.start, piece.stop) for piece in pieces]
            return msgspec.json.encode(around(shown))

        return Response(self._inference.write(write, tokens=len(pieces)), content_type="application/json")
