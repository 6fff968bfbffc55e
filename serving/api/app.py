"""The HTTP application: routes, and what holds for all of them (the key, CORS, errors).

Knows no dialect's bodies.
"""

import hmac
import logging
from http import HTTPStatus

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from serving.api import errors
from serving.api.chat import Chat
from serving.api.health import Health
from serving.api.identity import Identity
from serving.api.inference import Inference
from serving.api.native import Native
from serving.api.sagemaker import SageMaker
from serving.bridge import Bridge
from serving.errors import ClientGone, RequestError
from serving.settings import Settings
from serving.telemetry.metrics import Metrics
from serving.validation.validator import Validator

log = logging.getLogger(__name__)

PUBLIC_ENDPOINT = "health"
PUBLIC_METHODS = ("GET", "HEAD")
METHODS = ("GET", "HEAD", "POST")  # in the order in which `allow` names them
CORS_VARY = "origin, access-control-request-method, access-control-request-headers"


def create_app(*, bridge: Bridge[Validator], settings: Settings, metrics: Metrics, identity: Identity) -> Flask:
    """The WSGI application that serves what `bridge` decodes."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.payload_limit + 1  # a body of this length is one too long: see body.py
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False
    inference = Inference(bridge, metrics)
    native = Native(bridge, inference, identity)
    chat = Chat(bridge, inference, identity)
    _add_routes(app, Health(bridge, settings, metrics, identity), native, chat, SageMaker(bridge, native, chat))
    _add_cors(app, settings.cors_allow_origin)
    if settings.api_key is not None:
        _add_key(app, settings.api_key)
    _add_error_handlers(app)
    return app


def _add_routes(app: Flask, health: Health, native: Native, chat: Chat, sagemaker: SageMaker) -> None:
    for path in ("/", "/health", "/ping"):
        app.add_url_rule(path, PUBLIC_ENDPOINT, health.health, methods=["GET"])
    app.add_url_rule("/ping", "post_ping", health.health, methods=["POST"])
    app.add_url_rule("/info", "info", health.info, methods=["GET"])
    app.add_url_rule("/metrics", "metrics", health.metrics, methods=["GET"])
    app.add_url_rule("/", "generate_either", native.generate_either, methods=["POST"])
    app.add_url_rule("/generate", "generate", native.generate, methods=["POST"])
    app.add_url_rule("/generate_stream", "generate_stream", native.generate_stream, methods=["POST"])
    app.add_url_rule("/tokenize", "tokenize", native.tokenize, methods=["POST"])
    app.add_url_rule("/invocations", "invocations", sagemaker.invocations, methods=["POST"])
    app.add_url_rule("/v1/chat/completions", "chat", chat.completions, methods=["POST"])


def _add_cors(app: Flask, origins: tuple[str, ...]) -> None:
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


def _add_key(app: Flask, key: str) -> None:
    """Ask every request for the key, but for the public ones; what is routed nowhere is no exception."""
    expected = key.encode()

    @app.before_request
    def refuse_strangers() -> None:
        if request.endpoint == PUBLIC_ENDPOINT and request.method in PUBLIC_METHODS:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.strip().encode("latin-1", "replace"), expected)
        if not known or scheme.lower() != "bearer":
            raise errors.Unauthorized


def _add_error_handlers(app: Flask) -> None:
    @app.errorhandler(RequestError)
    def answer_error(error: RequestError) -> Response:
        return errors.answer(error, errors.native_body)

    @app.errorhandler(errors.Refusal)
    def answer_refusal(refusal: errors.Refusal) -> Response:
        return errors.answer_refusal(refusal)

    @app.errorhandler(ClientGone)
    def answer_nobody(error: ClientGone) -> Response:
        return errors.empty(errors.CLIENT_CLOSED_REQUEST)

    @app.errorhandler(HTTPException)
    def answer_unrouted(error: HTTPException) -> Response:
        response = errors.empty(error.code or HTTPStatus.INTERNAL_SERVER_ERROR)
        if isinstance(error, MethodNotAllowed):
            known = error.valid_methods or ()
            response.headers["allow"] = ",".join(method for method in METHODS if method in known)
        return response

    @app.errorhandler(Exception)
    def answer_fault(error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return errors.answer(errors.Internal(), errors.native_body)
