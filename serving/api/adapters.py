"""LoRA adapters that come and go while the server runs: `/adapters`, as SageMaker's adapter components ask for them.

Knows no weights. An adapter comes from a directory of this machine: no request makes the server fetch anything.
"""

import logging
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
from flask import Response, g, request

from serving.adapter_names import fault_of
from serving.api.body import fit, load_as, read_body
from serving.api.identity import Identity
from serving.api.schemas.openai import OWN_NAMES
from serving.api.schemas.sagemaker import AdapterDescription, AdapterList, AdapterRequest, Status
from serving.bridge import Bridge
from serving.errors import AdapterRefused, RequestError, ValidationError
from serving.validation.adapters import Adapter, Adapters
from serving.validation.validator import Validator

ADAPTER = "x-amzn-sagemaker-adapter-identifier"
QUERY_PREFIX = "Failed to deserialize query string: "
FILES = ("adapter_config.json", "adapter_model.safetensors")
CHUNK_BYTES, MOST_BYTES = 1 << 20, 4 << 30
NO_ADAPTER = f"`src` is no directory that holds {FILES[0]} and {FILES[1]}"
NO_PLACE = "`src` must be a directory of the server's machine: an absolute path, or file:// and one"

log = logging.getLogger(__name__)


class AdapterRoutes:
    """The handlers of the routes."""

    def __init__(self, bridge: Bridge[Validator], adapters: Adapters, identity: Identity) -> None:
        self._bridge = bridge
        self._adapters = adapters
        self._identity = identity

    def adapters(self) -> Response:
        """`GET /adapters`."""
        self._bridge.loaded()
        return _json(AdapterList([_description(adapter) for adapter in self._adapters.all()]))

    def adapter(self, name: str) -> Response:
        """`GET /adapters/{name}`: a list of one, as AWS's containers answer. Raises AdapterNotFound."""
        self._bridge.loaded()
        return _json([_description(self._adapters.find(name))])

    def load(self) -> Response:
        """`POST /adapters`.

        Raises:
            ValidationError: the name or the place is none.
            AdaptersUnsupported, AdapterConflict, NoRoomForAdapter, AdapterRefused: it cannot be loaded.
        """
        asked = self._asked()
        self._check_name(asked.name)
        place = _directory(asked.src)
        self._bridge.loaded()
        # Nothing is noted while the files are looked at: an unloading that came between would find nothing to undo.
        try:
            if self._adapters.known(asked.name, place) is None and not self._bridge.offload_long(_read, Path(place)):
                raise AdapterRefused(NO_ADAPTER)
            adapter = self._adapters.begin(asked.name, place)
            if not adapter.loaded:
                self._bring(adapter)
                log.info("The adapter %s is loaded", adapter.name)
        except RequestError as error:
            log.warning("The adapter %s is not loaded: %s", asked.name, error)
            raise
        return _json(Status(f"Adapter {adapter.name} registered"))

    def unload(self, name: str) -> Response:
        """`DELETE /adapters/{name}`. Raises AdapterNotFound."""
        self._bridge.loaded()
        self._bridge.drop_adapter(self._adapters.remove(name).number)
        log.info("The adapter %s is unloaded", name)
        return _json(Status(f"Adapter {name} unregistered"))

    def note_named(self) -> None:
        """Have the current request answered by the adapter that its header names. Raises AdapterNotFound."""
        if name := request.headers.get(ADAPTER, ""):
            self._bridge.loaded()
            g.adapter = self._adapters.find(name).name

    def _bring(self, adapter: Adapter) -> None:
        """Have an adapter loaded, or leave nothing of it."""
        try:
            self._bridge.load_adapter(adapter.number, adapter.place)
            if not self._adapters.finish(adapter):
                raise AdapterRefused("it was unloaded meanwhile")
        except BaseException as error:
            self._adapters.abandon(adapter)
            self._bridge.drop_adapter(adapter.number)
            if isinstance(error, AdapterRefused):  # whatever it says, no path leaves the server
                raise AdapterRefused(error.detail.replace(adapter.place, "`src`")) from None
            raise

    def _asked(self) -> AdapterRequest:
        if not {"name", "src"} & request.args.keys():
            return read_body(self._bridge, load_as(AdapterRequest))
        said = {name: {"true": True, "false": False}.get(value.lower(), value) for name, value in request.args.items()}
        said |= {name: request.args[name] for name in ("name", "src") if name in request.args}
        return fit(AdapterRequest, said, QUERY_PREFIX)

    def _check_name(self, name: str) -> None:
        if fault := fault_of(name):
            raise ValidationError(f"`name` {fault}")
        if name in (self._identity.model_id, *OWN_NAMES):
            raise ValidationError("`name` is one of the served model's own")


def _directory(src: str) -> str:
    """The directory that `src` means. Raises ValidationError."""
    path = src
    if src.startswith("file://"):
        try:
            parts = urlsplit(src)
        except ValueError:
            raise ValidationError(NO_PLACE) from None
        path = unquote(parts.path) if parts.netloc in ("", "localhost") else ""
    if not path.startswith("/") or not path.isprintable():
        raise ValidationError(NO_PLACE)
    return os.path.normpath(path)


def _read(directory: Path) -> bool:
    """Whether there is an adapter. Its files are read, so that the device need not wait for a disk: no endless ones."""
    left = MOST_BYTES
    try:
        if not all((directory / name).is_file() for name in FILES):
            return False
        for name in FILES:
            with (directory / name).open("rb", buffering=0) as file:
                while left > 0 and (chunk := file.read(CHUNK_BYTES)):
                    left -= len(chunk)
    except OSError:  # it may not be looked at, or its name is too long
        return False
    return True


def _description(adapter: Adapter) -> AdapterDescription:
    return AdapterDescription(name=adapter.name, src=adapter.place)


def _json(answer: object) -> Response:
    return Response(msgspec.json.encode(answer), content_type="application/json")
