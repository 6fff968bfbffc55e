"""OpenAI's list of models: `/v1/models` and `/v1/models/{id}`.

Knows no generation.
"""

import time

import msgspec
from flask import Response
from werkzeug.routing import BaseConverter

from serving.api.identity import Identity
from serving.api.schemas.openai import OWN_NAMES, Model, ModelList
from serving.errors import ModelNotFound


class ModelName(BaseConverter):
    """A model's name in a path: it may hold slashes, and be a path itself."""

    regex = "(?s:.+)"
    part_isolating = False


class Models:
    """The handlers of the routes; they answer while the model loads."""

    def __init__(self, identity: Identity) -> None:
        name = identity.model_id
        self._served = Model(id=name, created=int(time.time()), owned_by=name)

    def models(self) -> Response:
        """`GET /v1/models`."""
        return Response(msgspec.json.encode(ModelList(data=[self._served])), content_type="application/json")

    def model(self, name: str) -> Response:
        """`GET /v1/models/{id}`. Raises ModelNotFound."""
        if name not in (self._served.id, *OWN_NAMES):
            raise ModelNotFound(name)
        return Response(msgspec.json.encode(self._served), content_type="application/json")
