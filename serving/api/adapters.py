"""SageMaker's adapter components, `/adapters`: there are none yet, and nobody is served the base model in their place.

Knows no weights.
"""

import msgspec
from flask import Response, request

from serving.api.schemas.sagemaker import AdapterList
from serving.errors import AdapterNotFound, AdaptersUnsupported

ADAPTER = "x-amzn-sagemaker-adapter-identifier"


class Adapters:
    """The handlers of the routes."""

    def adapters(self) -> Response:
        """`GET /adapters`."""
        return Response(msgspec.json.encode(AdapterList(adapters=[])), content_type="application/json")

    def load(self) -> Response:
        """`POST /adapters`. Raises AdaptersUnsupported."""
        raise AdaptersUnsupported

    def unload(self, name: str) -> Response:
        """`DELETE /adapters/{name}`. Raises AdapterNotFound."""
        raise AdapterNotFound(name)

    def check(self) -> None:
        """Raises AdapterNotFound: the current request is for an adapter, and there is no such one."""
        if name := request.headers.get(ADAPTER, ""):
            raise AdapterNotFound(name)
