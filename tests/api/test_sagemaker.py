"""`/invocations` speaks the dialect that the body's shape belongs to."""

import pytest

CHAT = {"messages": [{"role": "user", "content": "say:ok"}]}


def test_inputs_are_answered_as_the_compatible_route_does(client):
    assert client.post("/invocations", json={"inputs": "Hello"}).json == [{"generated_text": "Hello world"}]


def test_inputs_stream_on_request(client, events):
    *_, last = events(client.post("/invocations", json={"inputs": "Hello", "stream": True}))
    assert last["generated_text"] == "Hello world"


def test_messages_are_answered_as_a_chat(client, events):
    assert client.post("/invocations", json=CHAT).json["choices"][0]["message"]["content"] == "ok"
    assert events(client.post("/invocations", json={**CHAT, "stream": True}))[-1] == "[DONE]"


def test_prompts_are_answered_as_completions(client, events):
    response = client.post("/invocations", json={"prompt": ["say:ok", "say:no"]})
    assert [choice["text"] for choice in response.json["choices"]] == ["ok", "no"]
    assert response.json["object"] == "text_completion"
    assert events(client.post("/invocations", json={"prompt": "say:ok", "stream": True}))[-1] == "[DONE]"


def test_messages_win_over_prompts(client):
    assert client.post("/invocations", json={**CHAT, "prompt": "x"}).json["object"] == "chat.completion"


def test_inputs_win_over_messages_if_they_fit(client):
    assert "generated_text" in client.post("/invocations", json={**CHAT, "inputs": "x"}).json[0]
    assert "choices" in client.post("/invocations", json={**CHAT, "inputs": ["x"]}).json


def test_errors_are_told_in_the_dialect_of_the_body(client):
    native = client.post("/invocations", json={"inputs": ""})
    openai = client.post("/invocations", json={**CHAT, "n": 0})
    assert native.json["error"] == "Input validation error: `inputs` cannot be empty"
    assert openai.json["error"]["message"].startswith("Input validation error: `n` ")
    assert (native.status_code, openai.status_code) == (422, 422)


@pytest.mark.parametrize(
    "body",
    [{}, [], {"inputs": 1}, {"prompt": []}, {"prompt": "x", "n": "1"}, {"inputs": "x", "parameters": {"top_k": 1.5}}],
)
def test_other_shapes(client, body):
    response = client.post("/invocations", json=body)
    assert response.status_code == 422
    assert response.content_type == "text/plain; charset=utf-8"
    assert response.text == (
        "Failed to deserialize the JSON body into the target type: "
        "data did not match any variant of untagged enum SagemakerRequest"
    )
