"""Who asks: the connection, the key's salt, the record and the request's name, taken from the request at hand.

Knows no route and no body.
"""

import time
import uuid

from flask import g, request

from serving.api.inference import Caller

REQUEST_ID = "x-request-id"
INFERENCE_ID = "x-amzn-sagemaker-inference-id"  # SageMaker lets no other name through
MAX_ID_LENGTH = 128


def caller() -> Caller:
    """Of the current request."""
    return Caller(
        connection=request.environ.get("gunicorn.socket"),
        cache_salt=g.get("cache_salt", ""),
        record=g.get("record"),
        session=g.get("session"),
        adapter=g.get("adapter"),
        arrived=arrived(),
    )


def arrived() -> float:
    """`time.monotonic()` of the first call for the current request."""
    if "arrived" not in g:
        g.arrived = time.monotonic()
    return float(g.arrived)


def request_id() -> str:
    """The client's name for the current request where it gave a fit one, else a new one; the same at every call."""
    if "request_id" not in g:
        given = request.headers.get(REQUEST_ID) or request.headers.get(INFERENCE_ID, "")
        fit = 0 < len(given) <= MAX_ID_LENGTH and given.isascii() and given.isprintable()
        g.request_id = given if fit else uuid.uuid4().hex
    return str(g.request_id)
