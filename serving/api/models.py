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
from serving.validation.adapters import Adapter, Adapters


class ModelName(BaseConverter):
    """A model's name in a path: it may hold slashes, and be a path itself."""

    regex = "(?s:.+)"
    part_isolating = False


class Models:
    """The served model and its adapters, by the names that OpenAI's routes know; they answer while the model loads."""

    def __init__(self, identity: Identity, adapters: Adapters) -> None:
        name = identity.model_id
        self._served = Model(id=name, created=int(time.time()), owned_by=name)
        self._own_names = (name, *OWN_NAMES)
        self._adapters = adapters

    def models(self) -> Response:
        """`GET /v1/models`."""
        data = [self._served, *(self._adapted(adapter) for adapter in self._adapters.all())]
        return Response(msgspec.json.encode(ModelList(data=data)), content_type="application/json")

    def model(self, name: str) -> Response:
        """`GET /v1/models/{id}`. Raises ModelNotFound."""
        found = dict.fromkeys(self._own_names, self._served)
        found |= {adapter.name: self._adapted(adapter) for adapter in self._adapters.all()}
        if name not in found:
            raise ModelNotFound(name)
        return Response(msgspec.json.encode(found[name]), content_type="application/json")

    def adapter_in(self, asked: str | None) -> str | None:
        """The adapter that the `model` of a request names; None: the model as it is, or there is no adapter at all.

        Raises:
            ModelNotFound: it is neither the model's name nor an adapter's.
        """
        if asked is None or asked in self._own_names or not self._adapters.claims(asked):
            return None
        if self._adapters.number_of(asked) is None:
            raise ModelNotFound(asked)
        return asked

    def _adapted(self, adapter: Adapter) -> Model:
        return Model(id=adapter.name, created=adapter.created, owned_by=self._served.id)
