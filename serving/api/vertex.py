"""Vertex AI's door, `/vertex`: a batch of texts and chats, answered whole.

Knows no dialect's fields.
"""

from contextlib import ExitStack

import msgspec
from flask import Response

from serving.api.body import load_as, read_body
from serving.api.caller import caller
from serving.api.chat import Chat
from serving.api.generation import Generation
from serving.api.inference import Inference
from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.vertex import VertexGenerate, VertexRequest, VertexResponse
from serving.bridge import Bridge
from serving.errors import NoInstances
from serving.validation.validator import Validator


class Vertex:
    """The handler of the route."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference, chat: Chat) -> None:
        self._bridge = bridge
        self._inference = inference
        self._chat = chat

    def predict(self) -> Response:
        """`POST /vertex`. An instance that fails fails them all, with its own error."""
        instances = read_body(self._bridge, load_as(VertexRequest)).instances
        if not instances:
            raise NoInstances
        with ExitStack() as open_generations:
            generations: list[Generation] = []
            for instance in instances:
                generations.append(self._begun(instance))
                open_generations.callback(generations[-1].close)
            predictions = [generation.collect()[0][0].finish.text for generation in generations]
        return Response(msgspec.json.encode(VertexResponse(predictions)), content_type="application/json")

    def _begun(self, instance: VertexGenerate | ChatRequest) -> Generation:
        if isinstance(instance, VertexGenerate):
            return self._inference.generate(instance.inputs, instance.checked_later(), stream=False, caller=caller())
        return self._chat.begin(instance, stream=False).generation
