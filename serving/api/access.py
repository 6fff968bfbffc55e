"""Who may call: the keys, and the origins that browsers may call from.

Knows no route but the public ones.
"""

import hashlib
import hmac
from collections.abc import Sequence
from http import HTTPStatus

from flask import Flask, Response, g, request

from serving.api import errors

PUBLIC_ENDPOINT = "health"
PUBLIC_METHODS = ("GET", "HEAD")
CORS_VARY = "origin, access-control-request-method, access-control-request-headers"


def add_cors(app: Flask, origins: Sequence[str]) -> None:
    """Let browsers call: any origin, or the named ones."""

    @app.before_request
    def answer_preflight() -> Response | None:
        if request.method != "OPTIONS":
            return None
        response = errors.empty(HTTPStatus.OK)
        response.headers["access-control-allow-methods"] = "GET,POST"
        response.headers["access-control-allow-headers"] = "content-type,authorization"
        return response

    @app.after_request
    def allow_origin(response: Response) -> Response:
        origin = request.headers.get("origin", "")
        if not origins or "*" in origins:
            response.headers["access-control-allow-origin"] = "*"
        elif origin in origins:
            response.headers["access-control-allow-origin"] = origin
        response.headers["vary"] = CORS_VARY
        return response


def add_keys(app: Flask, keys: Sequence[str]) -> None:
    """Ask every request for one of the keys, but for the public ones; what is routed nowhere is no exception.

    Each key has cached prefixes of its own, so that no client can tell by an answer's time what another has asked.
    """
    known = [_digest(key.encode()) for key in keys]

    @app.before_request
    def refuse_strangers() -> None:
        if request.endpoint == PUBLIC_ENDPOINT and request.method in PUBLIC_METHODS:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1", "replace"))
        matches = [hmac.compare_digest(digest, each) for each in known]  # every one, so that the time says nothing
        if not any(matches) or scheme.lower() != "bearer":
            raise errors.Unauthorized
        g.cache_salt = digest.hex()


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).digest()
