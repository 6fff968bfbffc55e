"""`/tokenize` and `/chat_tokenize` show prompts as the model gets them."""

import threading

import pytest

from serving.api import tokenization
from serving.api.schemas.native import TokenizePiece

CHAT = {"messages": [{"role": "user", "content": "hé"}]}


def test_tokens_have_byte_offsets(client):
    response = client.post("/tokenize", json={"inputs": "hé"})
    assert response.content_type == "application/json"
    assert response.text == (
        '[{"id":256,"text":"","start":0,"stop":0},{"id":71,"text":"h","start":0,"stop":1},'
        '{"id":127,"text":"é","start":1,"stop":3},{"id":102,"text":"é","start":1,"stop":3}]'
    )


def test_an_empty_text_and_a_long_one_are_taken(client):
    assert client.post("/tokenize", json={"inputs": ""}).json == [{"id": 256, "text": "", "start": 0, "stop": 0}]
    assert len(client.post("/tokenize", json={"inputs": "a" * 30_000}).json) == 30_001


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/tokenize", {"inputs": "a" * 30_000}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "a" * 30_000}]}),
    ],
)
def test_many_tokens_are_written_off_the_hub(monkeypatch, client, route, body):
    threads = set()

    def piece(*fields) -> TokenizePiece:
        threads.add(threading.get_ident())
        return TokenizePiece(*fields)

    monkeypatch.setattr(tokenization, "TokenizePiece", piece)
    assert client.post(route, json=body).status_code == 200
    assert threads
    assert threading.get_ident() not in threads


def test_truncation_does_not_count(client):
    assert len(client.post("/tokenize", json={"inputs": "abc", "parameters": {"truncate": 1}}).json) == 4


def test_a_chat_is_rendered_and_nothing_is_added(client):
    response = client.post("/chat_tokenize", json={**CHAT, "max_tokens": 0})
    assert (response.status_code, list(response.json)) == (200, ["tokenize_response", "templated_text"])
    text = response.json["templated_text"]
    assert text == "<user>hé\n<assistant>"
    pieces = response.json["tokenize_response"]
    assert len(pieces) == len(text.encode())
    assert pieces[6:9] == [
        {"id": 71, "text": "h", "start": 6, "stop": 7},
        {"id": 127, "text": "é", "start": 7, "stop": 9},
        {"id": 102, "text": "é", "start": 7, "stop": 9},
    ]


def test_its_errors_are_native(serve):
    response = serve(template=None).client.post("/chat_tokenize", json=CHAT)
    assert response.status_code == 422
    assert response.json == {"error": "Template error: template not found", "error_type": "template_error"}


def test_only_chats_count_as_requests(serve):
    server = serve()
    server.client.post("/tokenize", json={"inputs": "x"})
    assert server.metric("tgi_request_count") in (None, "0.0", "0")
    server.client.post("/chat_tokenize", json=CHAT)
    assert float(server.metric("tgi_request_count")) == 1
