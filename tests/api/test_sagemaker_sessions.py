"""Sticky sessions: begun, used, ended, and what they keep for their next request."""

import re
import time

import pytest

from serving.api import sessions

SESSION = "X-Amzn-SageMaker-Session-Id"
NEW = "X-Amzn-SageMaker-New-Session-Id"
CLOSED = "X-Amzn-SageMaker-Closed-Session-Id"
TOLD = re.compile(r"([a-zA-Z0-9](?:-*[a-zA-Z0-9])*); Expires=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
LONG = {"inputs": "a prompt of several blocks say:ok"}


@pytest.fixture(scope="module")
def server(serve_module):
    """A server whose answers do not begin with the prompt."""
    return serve_module(pipeline_tag="text2text-generation")


def begin(client, headers=None) -> str:
    response = client.post("/invocations", json={"requestType": "NEW_SESSION"}, headers=headers)
    assert response.status_code == 200, response.data
    return TOLD.fullmatch(response.headers[NEW])[1]


def end(client, session, headers=None):
    return client.post("/invocations", json={"requestType": "CLOSE"}, headers={SESSION: session, **(headers or {})})


def ask(client, session, body=LONG, headers=None):
    return client.post("/invocations", json=body, headers={SESSION: session, **(headers or {})})


def leased(server) -> int:
    return server.bridge._engine_loop._engine._scheduler.blocks._allocator.leased


def wait_leased(server, blocks) -> None:
    limit = time.monotonic() + 10
    while leased(server) != blocks:
        assert time.monotonic() < limit, f"{leased(server)} blocks are leased, not {blocks}"
        time.sleep(0.01)


def test_a_session_is_told_in_both_spellings(client):
    response = client.post("/invocations", json={"requestType": "NEW_SESSION"}, headers={SESSION: "NEW_SESSION"})
    assert response.headers[SESSION] == response.headers[NEW]
    session = TOLD.fullmatch(response.headers[NEW])[1]
    assert response.json == {"status": f"Session {session} created"}


def test_a_session_lives_until_it_is_closed(client):
    session = begin(client)
    assert ask(client, session).json == [{"generated_text": "ok"}]
    closed = end(client, session)
    assert (closed.status_code, closed.headers[CLOSED]) == (200, session)
    assert closed.json == {"status": f"Session {session} closed"}
    for response in (ask(client, session), end(client, session)):
        assert (response.status_code, response.json["error_type"]) == (400, "unknown_session")


def test_a_session_may_begin_with_a_request_for_work(client):
    response = ask(client, "NEW_SESSION")
    assert response.json == [{"generated_text": "ok"}]
    assert ask(client, TOLD.fullmatch(response.headers[NEW])[1]).status_code == 200


@pytest.mark.parametrize("session", ["", "NEW_SESSION", "nobodys"])
def test_only_open_sessions_can_be_closed(client, session):
    assert end(client, session).json["error_type"] == "unknown_session"


def test_a_session_ends_with_its_time(serve):
    client = serve(said={"session_lifetime": 0.01}).client
    session = begin(client)
    time.sleep(0.02)
    assert ask(client, session).status_code == 400


def test_too_many_sessions_are_refused_until_some_end(serve, monkeypatch):
    monkeypatch.setattr(sessions, "MOST", 2)
    client = serve().client
    first, _ = begin(client), begin(client)
    refused = client.post("/invocations", json={"requestType": "NEW_SESSION"})
    assert (refused.status_code, refused.json["error_type"]) == (429, "overloaded")
    end(client, first)
    begin(client)


def test_a_session_of_a_request_that_fails_is_not_left_open(serve, monkeypatch):
    monkeypatch.setattr(sessions, "MOST", 1)
    client = serve().client
    new = {SESSION: "NEW_SESSION"}
    route = {"X-Amzn-SageMaker-Custom-Attributes": "route=/nowhere"}
    responses = [
        client.post("/invocations", data=b"{", content_type="application/json", headers=new),
        ask(client, "NEW_SESSION", {"inputs": ""}),
        ask(client, "NEW_SESSION", headers=route),
        end(client, "NEW_SESSION"),
    ]
    assert [response.status_code for response in responses] == [400, 422, 404, 400], "and none of them 429"
    assert not any(NEW in response.headers for response in responses)
    kept = begin(client)
    client.post("/invocations", data=b"{", content_type="application/json", headers={SESSION: kept})
    assert ask(client, kept).status_code == 200, "a session that was there before lives on"


def test_one_keys_sessions_do_not_keep_another_out(serve, monkeypatch):
    monkeypatch.setattr(sessions, "MOST", 2)
    client = serve(api_key="one\ntwo").client
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    first, _ = begin(client, one), begin(client, one)
    assert client.post("/invocations", json={"requestType": "NEW_SESSION"}, headers=one).status_code == 429
    begin(client, two)
    assert ask(client, first, headers=one).status_code == 200


def test_keys_have_sessions_of_their_own(serve):
    client = serve(api_key="one\ntwo").client
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    session = begin(client, one)
    assert ask(client, session, headers=one).status_code == 200
    assert ask(client, session, headers=two).json["error_type"] == "unknown_session"
    assert end(client, session, two).status_code == 400
    assert ask(client, session, headers=one).status_code == 200


def test_what_a_session_computed_is_kept_until_its_end(serve):
    server = serve()
    session = begin(server.client)
    assert ask(server.client, session).status_code == 200
    tokens = len("<" + LONG["inputs"]) + len("ok")  # one for each byte, one before them; the last one is not computed
    wait_leased(server, tokens // 4)
    end(server.client, session)
    wait_leased(server, 0)


def test_a_routed_stream_belongs_to_the_session_too(serve, events):
    server = serve()
    session = begin(server.client)
    chat = {"messages": [{"role": "user", "content": "say:ok"}], "stream": True}
    route = {"X-Amzn-SageMaker-Custom-Attributes": "route=/v1/chat/completions"}
    assert events(ask(server.client, session, chat, route))[-1] == "[DONE]"
    limit = time.monotonic() + 10
    while not leased(server):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_request_without_a_session_keeps_nothing(serve):
    server = serve()
    begin(server.client)
    assert server.client.post("/invocations", json=LONG).status_code == 200
    assert leased(server) == 0


def test_a_body_for_work_that_names_a_type_is_work(client):
    assert client.post("/invocations", json={**LONG, "requestType": "CLOSE"}).json == [{"generated_text": "ok"}]
    assert client.post("/invocations", json={"requestType": "OTHER"}).status_code == 422
