"""Generations that do not end as they should: too many, abandoned, given up, or faulty."""

import socket

import gevent
import pytest

CHAT = {"messages": [{"role": "user", "content": "say:hello"}]}
ENDLESS = {"inputs": "x", "parameters": {"max_new_tokens": 50, "ignore_eos": True}}


def settled(server):
    """Whether all that a request held is given back."""
    with gevent.Timeout(10):
        while server.bridge.open_requests:
            gevent.sleep(0.005)
    server.client.post("/generate", json={"inputs": "y"})  # the device forgets rows with the next plan
    return len(server.runner.rows) == 1


def test_overload_is_told_with_a_time_to_come_back(serve, events):
    server = serve(permits=1)
    body = {"error": "Model is overloaded", "error_type": "overloaded"}
    with server.bridge.permit():
        whole = server.client.post("/generate", json={"inputs": "x"})
        stream = server.client.post("/generate_stream", json={"inputs": "x"})
        strict = server.client.post("/generate_stream", json={"inputs": "x"}, headers={"x-strict-status": "True"})
        chat = server.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert (whole.status_code, whole.json) == (429, body)
    assert int(whole.headers["retry-after"]) >= 1
    assert (stream.status_code, events(stream)) == (200, [body])
    assert (strict.status_code, strict.json) == (429, body)
    assert (chat.status_code, chat.json["error"]["type"]) == (429, "rate_limit_error")
    assert int(chat.headers["retry-after"]) >= 1
    assert float(server.metric('tgi_request_failure{err="overloaded"}')) == 4


def test_an_abandoned_stream_frees_what_it_held(serve):
    server = serve(delay_s=0.002)
    for path, request in (("/generate_stream", ENDLESS), ("/v1/chat/completions", {**CHAT, "stream": True, "n": 3})):
        response = server.client.post(path, json=request, buffered=False)
        assert next(response.iter_encoded()).startswith(b"data: ")
        response.close()
        assert settled(server)
    assert float(server.metric('tgi_request_failure{err="dropped"}')) == 2


def test_a_stream_that_nobody_begins_to_read_frees_what_it_held(serve):
    server = serve(delay_s=0.002)
    with server.app.test_request_context("/generate_stream", method="POST", json=ENDLESS):
        response = server.app.view_functions["generate_stream"]()
    assert server.bridge.open_requests == 1
    response.close()
    assert settled(server)


@pytest.mark.parametrize(
    ("path", "request_body"),
    [("/generate", {**ENDLESS, "parameters": {**ENDLESS["parameters"], "best_of": 2, "do_sample": True}}),
     ("/generate", ENDLESS), ("/v1/chat/completions", {**CHAT, "ignore_eos": True}), ("/generate_stream", ENDLESS)],
)  # fmt: skip
def test_a_client_that_hangs_up_ends_its_generation(serve, path, request_body):
    server = serve(delay_s=0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        gevent.spawn_later(0.05, theirs.shutdown, socket.SHUT_RDWR)
        response = server.client.post(path, json=request_body, environ_overrides={"gunicorn.socket": ours})
        assert response.status_code == (200 if "stream" in path else 499)
        assert b"error" not in response.data
        assert settled(server)
    assert float(server.metric('tgi_request_failure{err="dropped"}')) == 1
    assert server.runner.plans < 60


def nonsense_after(plans):
    def choose(row, choice):
        choose.count += 1
        return type(choice)(token_id=9999, logprob=0.0) if choose.count > plans else choice

    choose.count = 0
    return choose


GAVE_UP = "Request failed during generation: "


def test_a_generation_that_is_given_up_is_a_424(serve):
    server = serve(bad_choice=nonsense_after(2))
    response = server.client.post("/generate", json={"inputs": "say:hello"})
    assert response.status_code == 424
    assert response.json["error_type"] == "generation"
    assert response.json["error"].startswith(GAVE_UP)
    assert float(server.metric('tgi_request_failure{err="generation"}')) == 1


def test_a_stream_that_is_given_up_ends_with_an_error_event(serve, events):
    server = serve(bad_choice=nonsense_after(2))
    response = server.client.post("/generate_stream", json={"inputs": "say:hello"})
    assert response.status_code == 200
    first, second, last = events(response)
    assert (first["token"]["text"], second["token"]["text"]) == ("h", "e")
    assert last["error_type"] == "generation"
    assert last["error"].startswith(GAVE_UP)


def test_a_chat_stream_that_is_given_up_ends_with_an_error_event_and_the_end(serve, events):
    server = serve(bad_choice=nonsense_after(2))
    response = server.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    *_, last, done = events(response)
    assert (last["error_type"], done) == ("generation", "[DONE]")
    assert last["error"]["message"].startswith(GAVE_UP)


@pytest.mark.parametrize(
    ("path", "request_body", "headers"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True}, {}),
        ("/generate_stream", {"inputs": "x"}, {"X-Strict-Status": "true"}),
    ],
)
def test_a_stream_that_fails_before_its_first_token_has_a_real_status(serve, path, request_body, headers):
    response = serve(bad_choice=nonsense_after(0)).client.post(path, json=request_body, headers=headers)
    assert response.status_code == 424
    assert response.json["error_type"] == "generation"


def test_a_plain_stream_keeps_its_200_then(serve, events):
    response = serve(bad_choice=nonsense_after(0)).client.post("/generate_stream", json={"inputs": "x"})
    assert response.status_code == 200
    (only,) = events(response)
    assert only["error_type"] == "generation"


def test_waiting_for_the_first_token_gives_up_when_a_keep_alive_is_due(serve):
    server = serve(keep_alive_s=0.02, delay_s=0.2)
    response = server.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1, "stream": True})
    assert response.status_code == 200
    assert response.data.startswith(b":\n\n")
    assert response.data.endswith(b"data: [DONE]\n\n")


def test_streams_end_with_an_event_at_the_drain_deadline(serve, events):
    server = serve(delay_s=0.02)
    gevent.spawn_later(0.1, server.bridge.drain, 0)
    shown = events(server.client.post("/generate_stream", json=ENDLESS))
    assert shown[-1]["error_type"] == "generation"
    assert "token" in shown[0]


def test_requests_that_run_while_draining_are_answered(serve):
    server = serve(delay_s=0.01)
    gevent.spawn_later(0.02, server.bridge.drain, 10)
    response = server.client.post("/generate", json={"inputs": "say:hello"})
    assert (response.status_code, response.json) == (200, {"generated_text": "hello"})
    assert response.headers["x-compute-type"] == "1-fake"


def test_a_stream_outlives_its_device(serve, events):
    server = serve(die_after=3, delay_s=0.005)
    *_, last = events(server.client.post("/generate_stream", json={"inputs": "say:hi"}))
    assert last["generated_text"] == "hi"


WRAPPED_FAULT = {"message": "Internal server error", "type": "server_error", "param": None, "code": None}


@pytest.mark.parametrize(
    ("path", "request_body", "error"),
    [
        ("/generate", {"inputs": "x"}, "Internal server error"),
        ("/vertex", {"instances": [CHAT]}, "Internal server error"),
        ("/v1/chat/completions", CHAT, WRAPPED_FAULT),
        ("/v1/completions", {"prompt": "x"}, WRAPPED_FAULT),
        ("/invocations", {"inputs": "x"}, "Internal server error"),
        ("/invocations", CHAT, WRAPPED_FAULT),
        ("/invocations", {"prompt": "x"}, WRAPPED_FAULT),
    ],
)
def test_a_fault_shows_nothing_of_the_inside(serve, monkeypatch, caplog, path, request_body, error):
    server = serve()
    monkeypatch.setattr(type(server.bridge), "permit", lambda self: 1 / 0)
    response = server.client.post(path, json=request_body)
    assert response.status_code == 500
    assert response.json == {"error": error, "error_type": "internal"}
    assert "ZeroDivisionError" in caplog.text


def test_a_fault_inside_a_stream_shows_nothing_either(serve, monkeypatch, events, caplog):
    server = serve()
    monkeypatch.setattr("serving.api.native._event", lambda *args, **kwargs: 1 / 0)
    response = server.client.post("/generate_stream", json={"inputs": "x"})
    assert events(response) == [{"error": "Internal server error", "error_type": "internal"}]
    assert "ZeroDivisionError" in caplog.text
    response.close()
    assert server.bridge.open_requests == 0
