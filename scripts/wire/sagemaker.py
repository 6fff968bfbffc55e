"""SageMaker's own rows: bodies beside JSON, Accept, and the headers that the platform lets through.

Knows no other platform. The rows number the sections of this page of the contract: bodies, headers, sessions, adapters.
"""

import json
import re

import requests

from scripts.wire.suite import (
    WEIR,
    Target,
    check,
    demand,
    empty,
    events,
    json_of,
    native_error,
    ok,
    same,
    status,
)

DOOR = "/invocations"
SESSION = "x-amzn-sagemaker-session-id"
SHORT = {"inputs": "What is Deep Learning?", "parameters": {"max_new_tokens": 3, "return_full_text": False}}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "model": ""}
TOLD = re.compile(r"[a-zA-Z0-9](?:-*[a-zA-Z0-9])*; Expires=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
LINES = "application/jsonlines"


def _text(target: Target, response: requests.Response) -> str:
    return str(json_of(ok(response))[0]["generated_text"])


@check("sm.1", WEIR)
def ping_is_asked_in_three_ways(target: Target) -> None:
    """GET, HEAD and POST."""
    for method in ("GET", "HEAD", "POST"):
        empty(target.ask(method, "/ping"), 200)


@check("sm.2", WEIR)
def plain_text_goes_in_and_comes_out(target: Target) -> None:
    """`text/plain` is what to go on with, and as Accept the answer's text alone."""
    whole = _text(target, target.post(DOOR, SHORT))
    alone = ok(target.post(DOOR, SHORT, headers={"accept": "text/plain"}))
    same(alone.headers.get("content-type"), "text/plain; charset=utf-8", "content-type")
    same(alone.content.decode(), whole, "the text alone")
    taken = target.post_bytes(DOOR, b"Hi", "text/plain")
    demand(isinstance(_text(target, taken), str), "no text for a text")


@check("sm.2", WEIR)
def each_line_is_answered_with_a_line(target: Target) -> None:
    """JSON lines: in order, a failure in its own line."""
    body = b'{"inputs":"Hi","parameters":{"max_new_tokens":2}}\n{"inputs":""}\n{"prompt":"Hi","max_tokens":2}\n'
    response = ok(target.post_bytes(DOOR, body, LINES))
    same(response.headers.get("content-type"), LINES, "content-type")
    demand(response.text.endswith("\n"), "the last line has no end")
    first, second, third = (json.loads(line) for line in response.text.splitlines())
    same(list(first[0]), ["generated_text"], "keys of the first line")
    same(second["error_type"], "validation", "the second line's error")
    same(third["object"], "text_completion", "the third line's object")


@check("sm.2", WEIR)
def accept_asks_for_a_stream(target: Target) -> None:
    """Where `stream` is absent."""
    wish = {"accept": "text/event-stream"}
    found = events(ok(target.post(DOOR, SHORT, headers=wish)))
    same(len(found), 3, "events")
    events(ok(target.post(DOOR, CHAT, headers=wish)), done=True)
    same(type(json_of(ok(target.post(DOOR, {**SHORT, "stream": False}, headers=wish)))), list, "type of the answer")


@check("sm.3", WEIR)
def attributes_lead_to_other_routes(target: Target) -> None:
    """`route=`; never back to this route, never to what is no work."""
    name = "x-amzn-sagemaker-custom-attributes"
    led = ok(target.post(DOOR, CHAT, headers={name: "route=/v1/chat/completions"}))
    same(json_of(led)["object"], "chat.completion", "object")
    for nowhere in ("/invocations", "/ping", "/nowhere"):
        refused = status(target.post(DOOR, CHAT, headers={name: f"route={nowhere}"}), 404)
        same(json_of(refused)["error_type"], "unknown_route", "error type")


@check("sm.3", WEIR)
def the_inference_id_names_the_request(target: Target) -> None:
    """As `x-request-id`."""
    answer = ok(target.post(DOOR, SHORT, headers={"x-amzn-sagemaker-inference-id": "order-7"}))
    same(answer.headers.get("x-request-id"), "order-7", "x-request-id")


@check("sm.4", WEIR)
def sessions_begin_and_end(target: Target) -> None:
    """NEW_SESSION and CLOSE, told in both spellings."""
    begun = ok(target.post(DOOR, {"requestType": "NEW_SESSION"}, headers={SESSION: "NEW_SESSION"}))
    told = begun.headers.get("x-amzn-sagemaker-new-session-id", "")
    demand(TOLD.fullmatch(told), f"the new session is told as {told!r}")
    same(begun.headers.get(SESSION), told, "the other spelling")
    session = told.partition(";")[0]
    ok(target.post(DOOR, SHORT, headers={SESSION: session}))
    closed = ok(target.post(DOOR, {"requestType": "CLOSE"}, headers={SESSION: session}))
    same(closed.headers.get("x-amzn-sagemaker-closed-session-id"), session, "the closed session")
    over = status(target.post(DOOR, SHORT, headers={SESSION: session}), 400)
    same(json_of(over)["error_type"], "unknown_session", "error type")


@check("sm.5", WEIR)
def an_unknown_adapter_is_not_the_base_model(target: Target) -> None:
    """By the platform's header."""
    refused = target.post(DOOR, SHORT, headers={"x-amzn-sagemaker-adapter-identifier": "nobodys"})
    native_error(refused, 404, "The adapter `nobodys` does not exist", "adapter_not_found")
    native_error(
        target.ask("DELETE", "/adapters/nobodys"), 404, "The adapter `nobodys` does not exist", "adapter_not_found"
    )


@check("sm.5", WEIR)
def adapters_are_listed_and_only_well_named_ones_are_taken(target: Target) -> None:
    """`/adapters`: what is there, names that fit a path, places on the server's machine alone."""
    listed = json_of(ok(target.get("/adapters")))
    demand(all({"name", "src"} <= each.keys() for each in listed["adapters"]), "an adapter without name or src")
    for asked in ({"name": "a b", "src": "/a"}, {"name": "..", "src": "/a"}, {"name": "a", "src": "https://hub/a"}):
        refused = status(target.post("/adapters", asked), 422)
        same(json_of(refused)["error_type"], "validation", f"error type of {asked}")
    nothing = {"name": "nobodys", "src": "/no/such/directory"}
    refused = target.post("/adapters", nothing)
    demand(refused.status_code in (424, 507), f"{refused.status_code} for a directory that is not there")
    demand("/no/such" not in refused.text, "the answer tells a path")
    native_error(target.get("/adapters/nobodys"), 404, "The adapter `nobodys` does not exist", "adapter_not_found")


@check("sm.6", WEIR)
def batch_transforms_are_told_how_to_ask(target: Target) -> None:
    """`/execution-parameters`."""
    told = json_of(ok(target.get("/execution-parameters")))
    same(list(told), ["MaxConcurrentTransforms", "BatchStrategy", "MaxPayloadInMB"], "keys")
    demand(told["MaxConcurrentTransforms"] * told["MaxPayloadInMB"] <= 100, "more than 100 MB under way")
