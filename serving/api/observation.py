"""What is noted of each request, from its head to the end of its answer.

Knows no body: neither prompts nor answers can get into a record from here.
"""

from collections.abc import Callable
from types import MappingProxyType

from flask import Flask, Response, g, request

from serving.api.caller import request_id
from serving.telemetry.journal import Journal, RequestRecord

# TGI's names for what serves a POST to these routes; the other routes say nothing of work, and are asked every second.
HANDLERS = MappingProxyType(
    {
        "/": "compat_generate",
        "/generate": "generate",
        "/generate_stream": "generate_stream",
        "/tokenize": "tokenize",
        "/chat_tokenize": "get_chat_tokenize",
        "/invocations": "sagemaker_compatibility",
        "/vertex": "vertex_compatibility",
        "/v1/chat/completions": "chat_completions",
        "/v1/completions": "completions",
    }
)


def observe(app: Flask, journal: Journal, model_id: str) -> None:
    """Give each work request a record, `g.record`, that goes to the journal when the answer has ended.

    To be called before anything else is asked before requests, so that refusals are noted too.
    """

    @app.before_request
    def begin() -> None:
        route = "" if request.url_rule is None else request.url_rule.rule
        if request.method == "POST" and route in HANDLERS:
            g.record = RequestRecord(
                handler=HANDLERS[route],
                method=request.method,
                route=route,
                request_id=request_id(),
                model=model_id,
                traceparent=request.headers.get("traceparent", ""),
                tracestate=request.headers.get("tracestate", ""),
            )

    @app.after_request
    def note_status(response: Response) -> Response:
        record: RequestRecord | None = g.get("record")
        if record is not None:
            record.status = response.status_code
            response.call_on_close(_end(record, journal))
        return response


def _end(record: RequestRecord, journal: Journal) -> Callable[[], None]:
    def end() -> None:
        record.close()
        journal.add(record)

    return end
