"""OpenAI's older route: the prompt before the answer, and log probabilities of both."""

import pytest

URL = "/v1/completions"
SAY_A = [82, 64, 88, 25, 64]  # the token ids of "say:a"


def asked(prompt="say:ab", **fields):
    return {"prompt": prompt, **fields}


def test_log_probabilities_are_those_of_the_older_route(client, events):
    body = asked("say:aé", logprobs=2)
    whole = client.post(URL, json=body).json["choices"][0]["logprobs"]
    assert list(whole) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert whole["tokens"] == ["a", "", "é", "</s>"]
    assert whole["text_offset"] == [0, 1, 1, 2]
    assert all(value < 0 for value in whole["token_logprobs"])
    assert whole["top_logprobs"][0] == {
        "a": whole["token_logprobs"][0],
        "b": whole["token_logprobs"][0] - 1,
    }
    *chunks, _ = events(client.post(URL, json={**body, "stream": True}))
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {key: [item for piece in pieces for item in piece[key]] for key in whole} == whole


def test_without_alternatives_only_the_tokens_are_told(client):
    whole = client.post(URL, json=asked("say:a", logprobs=0)).json["choices"][0]["logprobs"]
    assert (whole["tokens"], whole["top_logprobs"]) == (["a", "</s>"], None)


@pytest.mark.parametrize(
    ("prompt", "text"), [("say:hé", "say:héhé"), ([256, *SAY_A], "<s>say:aa"), (["say:a"], "say:aa")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_answer(client, events, prompt, text, stream):
    response = client.post(URL, json=asked(prompt, echo=True, stream=stream))
    if stream:
        *chunks, _ = events(response)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    else:
        assert response.json["choices"][0]["text"] == text


def test_echo_with_log_probabilities_tells_those_of_the_prompt(client, events):
    body = asked("say:é", echo=True, logprobs=1)
    choice = client.post(URL, json=body).json["choices"][0]
    assert choice["text"] == "say:éé"
    told = choice["logprobs"]
    assert told["tokens"] == ["<s>", "s", "a", "y", ":", "\ufffd", "\ufffd", "", "é", "</s>"]
    assert told["token_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert told["top_logprobs"][:7] == [None] * 7
    assert None not in told["top_logprobs"][7:]
    assert told["text_offset"] == [0, 0, 1, 2, 3, 4, 4, 5, 5, 6]
    *chunks, _ = events(client.post(URL, json={**body, "stream": True}))
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {key: [item for piece in pieces for item in piece[key]] for key in told} == told


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_an_answer(client, events, stream):
    response = client.post(URL, json=asked("say:x", echo=True, max_tokens=0, logprobs=0, stream=stream))
    if stream:
        chunk, _ = events(response)
        assert chunk["usage"]["completion_tokens"] == 0
    else:
        chunk = response.json
        assert chunk["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
        assert response.headers["x-generated-tokens"] == "0"
    (choice,) = chunk["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("say:x", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "s", "a", "y", ":", "x"]
    assert len(choice["logprobs"]["token_logprobs"]) == 6


def test_echo_with_log_probabilities_needs_the_operators_leave(serve):
    response = serve(prefill_logprobs=False).client.post(URL, json=asked(echo=True, logprobs=0))
    assert response.status_code == 422
    assert "--enable-prefill-logprobs" in response.json["error"]["message"]
