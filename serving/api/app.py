"""The HTTP application: routes, and what holds for all of them (who may call, names of requests, errors).

Knows no dialect's bodies.
"""

import logging
from http import HTTPStatus

from flask import Flask, Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from serving.api import errors
from serving.api.access import PUBLIC_ENDPOINT, add_cors, add_keys
from serving.api.adapters import AdapterRoutes
from serving.api.caller import REQUEST_ID, arrived, request_id
from serving.api.chat import Chat
from serving.api.completions import Completions
from serving.api.docs import Docs
from serving.api.headers import lower_cased
from serving.api.health import Health
from serving.api.identity import Identity
from serving.api.inference import Inference
from serving.api.models import ModelName, Models
from serving.api.native import Native
from serving.api.observation import observe
from serving.api.openapi import document
from serving.api.sagemaker import SageMaker
from serving.api.tokenization import Tokenization
from serving.api.vertex import Vertex
from serving.bridge import Bridge
from serving.errors import ClientGone, RequestError
from serving.settings import Settings
from serving.telemetry.journal import Journal
from serving.telemetry.metrics import Metrics
from serving.validation.adapters import Adapters
from serving.validation.validator import Validator

log = logging.getLogger(__name__)

METHODS = ("GET", "HEAD", "POST", "DELETE")  # in the order in which `allow` names them


def create_app(
    *,
    bridge: Bridge[Validator],
    settings: Settings,
    metrics: Metrics,
    identity: Identity,
    adapters: Adapters,
    journal: Journal | None = None,
) -> Flask:
    """The WSGI application that serves what `bridge` decodes; what becomes of requests goes to `journal`.

    Args:
        adapters: those that the validator knows.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.payload_limit + 1  # a body of this length is one too long: see body.py
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False
    if journal is not None:
        observe(app, journal, identity.model_id)
    app.url_map.converters["model"] = ModelName
    models = Models(identity, adapters)
    _add_operators_routes(app, Health(bridge, settings, metrics, identity), models)
    inference = Inference(
        bridge,
        metrics,
        response_deadline_s=settings.response_deadline,
        stream_deadline_s=settings.stream_deadline,
    )
    routes = AdapterRoutes(bridge, adapters, identity)
    _add_adapters(app, routes)
    _add_work(app, bridge, inference, identity, settings, models, routes)
    _add_pages(app, Docs(document()))
    add_cors(app, settings.cors_allow_origin)
    _add_names(app)
    if settings.api_keys:
        add_keys(app, settings.api_keys)
    _add_error_handlers(app)
    app.wsgi_app = lower_cased(app.wsgi_app)  # type: ignore[method-assign]  # Flask's documented way
    return app


def _add_operators_routes(app: Flask, health: Health, models: Models) -> None:
    for path in ("/", "/health", "/ping"):
        app.add_url_rule(path, PUBLIC_ENDPOINT, health.health, methods=["GET"])
    app.add_url_rule("/ping", "post_ping", health.health, methods=["POST"])
    app.add_url_rule("/info", "info", health.info, methods=["GET"])
    app.add_url_rule("/metrics", "metrics", health.metrics, methods=["GET"])
    app.add_url_rule("/v1/models", "models", models.models, methods=["GET"])
    app.add_url_rule("/v1/models/<model:name>", "model", models.model, methods=["GET"])


def _add_adapters(app: Flask, adapters: AdapterRoutes) -> None:
    for method, path, endpoint, view in (
        ("GET", "/adapters", "adapters", adapters.adapters),
        ("POST", "/adapters", "load_adapter", adapters.load),
        ("GET", "/adapters/<model:name>", "adapter", adapters.adapter),
        ("DELETE", "/adapters/<model:name>", "unload_adapter", adapters.unload),
    ):
        app.add_url_rule(path, endpoint, view, methods=[method])


def _add_work(
    app: Flask,
    bridge: Bridge[Validator],
    inference: Inference,
    identity: Identity,
    settings: Settings,
    models: Models,
    adapters: AdapterRoutes,
) -> None:
    native = Native(bridge, inference, identity)
    chat = Chat(bridge, inference, identity, models)
    completions = Completions(bridge, inference, identity, models)
    tokenization = Tokenization(bridge, inference)
    work = (
        ("/", "generate_either", native.generate_either),
        ("/generate", "generate", native.generate),
        ("/generate_stream", "generate_stream", native.generate_stream),
        ("/tokenize", "tokenize", tokenization.tokenize),
        ("/chat_tokenize", "chat_tokenize", tokenization.chat_tokenize),
        ("/vertex", "vertex", Vertex(bridge, inference, chat).predict),
        ("/v1/chat/completions", "chat", chat.completions),
        ("/v1/completions", "completions", completions.completions),
    )
    for path, endpoint, view in work:
        app.add_url_rule(path, endpoint, view, methods=["POST"])
    sagemaker = SageMaker(
        bridge=bridge,
        settings=settings,
        native=native,
        chat=chat,
        completions=completions,
        adapters=adapters,
        routes={path: view for path, _, view in work},
    )
    for method, path, endpoint, view in (
        ("POST", "/invocations", "invocations", sagemaker.invocations),
        ("GET", "/execution-parameters", "execution_parameters", sagemaker.execution_parameters),
    ):
        app.add_url_rule(path, endpoint, view, methods=[method])


def _add_pages(app: Flask, docs: Docs) -> None:
    for path, endpoint, view in (
        ("/api-doc/openapi.json", "openapi", docs.openapi),
        ("/docs", "docs", docs.docs),
        ("/docs/", "docs_page", docs.docs_page),
        ("/docs/<name>", "docs_file", docs.docs_file),
        ("/playground", "playground", docs.playground),
        ("/playground/<name>", "playground_file", docs.playground_file),
    ):
        app.add_url_rule(path, endpoint, view, methods=["GET"])


def _add_names(app: Flask) -> None:
    @app.before_request
    def note_arrival() -> None:
        arrived()

    @app.after_request
    def name_request(response: Response) -> Response:
        response.headers[REQUEST_ID] = request_id()
        return response


def _add_error_handlers(app: Flask) -> None:
    @app.errorhandler(RequestError)
    def answer_error(error: RequestError) -> Response:
        return errors.answer(error, errors.dialect())

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
        return errors.answer(errors.Internal(), errors.dialect())
