"""What `/invocations` reads and writes beside JSON: text, JSON lines, and what the client accepts."""

import json
import threading

import pytest

CHAT = {"messages": [{"role": "user", "content": "say:ok"}]}
NATIVE = {"inputs": "say:yes", "parameters": {"max_new_tokens": 8}}
LINES = "application/jsonlines"


@pytest.fixture(scope="module")
def server(serve_module):
    """A server whose answers do not begin with the prompt."""
    return serve_module(pipeline_tag="text2text-generation")


def lines_of(response) -> list:
    assert (response.status_code, response.content_type) == (200, LINES)
    text = response.get_data(as_text=True)
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def invoke_lines(client, *bodies, kind=LINES):
    body = "\n".join(body if isinstance(body, str) else json.dumps(body) for body in bodies)
    return client.post("/invocations", data=body, content_type=kind)


def test_a_text_is_gone_on_with(client):
    response = client.post("/invocations", data="say:grün", content_type="text/plain; charset=utf-8")
    assert response.json == [{"generated_text": "grün"}]


def test_a_text_that_is_not_utf_8_is_refused(client):
    response = client.post("/invocations", data=b"\xff", content_type="text/plain")
    assert (response.status_code, response.content_type) == (400, "text/plain; charset=utf-8")
    assert "UTF-8" in response.text


def test_an_empty_text_breaks_the_rule_of_empty_inputs(client):
    response = client.post("/invocations", data="", content_type="text/plain")
    assert (response.status_code, response.json["error_type"]) == (422, "validation")


@pytest.mark.parametrize(
    ("body", "text"),
    [(NATIVE, "yes"), (CHAT, "ok"), ({"prompt": ["say:a", "say:b"]}, "a"), ({"inputs": "say:"}, "")],
)
def test_accepting_plain_text_gives_the_text_alone(client, body, text):
    response = client.post("/invocations", json=body, headers={"accept": "text/plain"})
    assert (response.text, response.content_type) == (text, "text/plain; charset=utf-8")
    assert response.headers["content-length"] == str(len(text))
    assert response.headers["x-generated-tokens"]


def test_the_text_alone_has_no_prompt_before_it(serve):
    client = serve().client
    response = client.post("/invocations", data="say:a", content_type="text/plain", headers={"accept": "text/plain"})
    assert response.text == "a"
    full = {**NATIVE, "parameters": {"return_full_text": True}}
    assert client.post("/invocations", json=full, headers={"accept": "text/plain"}).text == "say:yesyes"


def test_errors_are_json_whatever_is_accepted(client):
    response = client.post("/invocations", json={"inputs": ""}, headers={"accept": "text/plain"})
    assert (response.status_code, response.json["error_type"]) == (422, "validation")


@pytest.mark.parametrize("body", [NATIVE, CHAT, {"prompt": "say:a"}])
def test_accepting_events_asks_for_a_stream(client, events, body):
    assert len(events(client.post("/invocations", json=body, headers={"accept": "text/event-stream"}))) > 1


def test_a_text_can_be_answered_with_a_stream(client, events):
    headers = {"accept": "text/event-stream"}
    streamed = events(client.post("/invocations", data="say:ab", content_type="text/plain", headers=headers))
    assert streamed[-1]["generated_text"] == "ab"


@pytest.mark.parametrize("accept", ["application/json", "*/*", "application/json, text/event-stream", "image/png", ""])
def test_other_wishes_get_json(client, accept):
    response = client.post("/invocations", json=NATIVE, headers={"accept": accept})
    assert response.json == [{"generated_text": "yes"}]


def test_the_body_wins_over_what_is_accepted(client, events):
    headers = {"accept": "text/event-stream"}
    whole = client.post("/invocations", json={**NATIVE, "stream": False}, headers=headers)
    assert whole.json == [{"generated_text": "yes"}]
    assert events(client.post("/invocations", json={**NATIVE, "stream": True}, headers={"accept": "text/plain"}))


def test_every_stream_ends_with_an_empty_line(client):
    for body in (NATIVE, CHAT, {"prompt": "say:a"}, {"inputs": ""}):
        data = client.post("/invocations", json={**body, "stream": True}).get_data()
        assert data.endswith(b"\n\n")


def test_the_default_model_has_an_empty_name(client):
    for body in (CHAT, {"prompt": "say:a"}):
        path = "/v1/chat/completions" if body is CHAT else "/v1/completions"
        response = client.post(path, json={**body, "model": ""})
        assert (response.status_code, response.json["model"]) == (200, "demo/model")


@pytest.mark.parametrize("kind", [LINES, "application/x-jsonlines", "application/jsonl", "application/x-ndjson"])
def test_each_line_is_answered_with_a_line(client, kind):
    native, chat, completion = lines_of(invoke_lines(client, NATIVE, CHAT, {"prompt": "say:a"}, kind=kind))
    assert native == [{"generated_text": "yes"}]
    assert chat["choices"][0]["message"]["content"] == "ok"
    assert completion["choices"][0]["text"] == "a"


def test_a_bad_line_spoils_no_other(client):
    answers = lines_of(
        invoke_lines(client, NATIVE, "{", {"inputs": ""}, {**CHAT, "n": 0}, {}, {"requestType": "CLOSE"}, "", NATIVE)
    )
    assert answers[0] == answers[-1] == [{"generated_text": "yes"}]
    assert answers[1]["error"].startswith("Failed to parse the request body as JSON")
    assert answers[2]["error"] == "Input validation error: `inputs` cannot be empty"
    assert answers[3]["error"]["message"].startswith("Input validation error: `n` ")
    assert [answer["error_type"] for answer in answers[4:6]] == ["validation", "validation"]
    assert len(answers) == 7, "an empty line is none"


def test_more_lines_than_permits_are_answered_in_their_order(serve):
    server = serve(permits=3, pipeline_tag="text2text-generation")
    answers = lines_of(invoke_lines(server.client, *({"inputs": f"say:{number}"} for number in range(40))))
    assert answers == [[{"generated_text": str(number)}] for number in range(40)]
    assert server.bridge.open_requests == 0


def test_lines_are_decoded_together(serve):
    server = serve(delay_s=0.001)
    lines_of(invoke_lines(server.client, *({"inputs": f"say:{'x' * 20}"} for _ in range(8))))
    assert max(step.rows for step in server.steps) > 1


def test_lines_that_ask_for_streams_are_answered_whole(client):
    assert lines_of(invoke_lines(client, {**NATIVE, "stream": True})) == [[{"generated_text": "yes"}]]


def test_a_body_of_lines_has_lines(client):
    response = invoke_lines(client, "", " ")
    assert (response.status_code, response.content_type) == (422, "text/plain; charset=utf-8")


def test_lines_that_cannot_be_taken_in_now_are_refused_as_a_whole(serve):
    gate = threading.Event()
    server = serve(ready=False, start_gate=gate)
    try:
        response = invoke_lines(server.client, NATIVE, NATIVE)
        assert (response.status_code, response.json["error_type"]) == (503, "not_ready")
    finally:
        gate.set()
    full = serve(permits=1)
    with full.bridge.permit():
        response = invoke_lines(full.client, NATIVE)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
