"""An answer whose time is over is given as far as it is, before the platform throws it away."""

import json

import pytest

from serving.api.native import _frames
from serving.protocol import Finish, FinishReason, OutputToken, RequestOutput
from serving.validation.parameters import Parameters

WORDS = "word " * 200
ASKED = {"inputs": "say:" + WORDS}
BOUND = {"max_total_tokens": 4096, "delay_s": 0.01}


@pytest.fixture
def client(serve):
    """Of a server on which answers of 200 words do not come to their ends."""
    return serve(said={"response_deadline": 0.4, "stream_deadline": 0.4}, **BOUND).client


def test_a_whole_answer_is_cut_with_what_is_there(client):
    response = client.post("/generate", json={**ASKED, "parameters": {"details": True}})
    assert (response.status_code, response.headers["x-response-cut"]) == (200, "deadline")
    text, details = response.json["generated_text"], response.json["details"]
    assert text
    assert WORDS.startswith(text)
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(text)


def test_openai_clients_read_length_too(client):
    chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": ASKED["inputs"]}]})
    completion = client.post("/v1/completions", json={"prompt": [ASKED["inputs"]] * 2, "max_tokens": 900})
    for choice in chat.json["choices"] + completion.json["choices"]:
        assert choice["finish_reason"] == "length"
    assert chat.json["usage"]["completion_tokens"] > 0
    assert completion.headers["x-response-cut"] == "deadline"


def test_a_stream_ends_as_every_stream_does(client, events):
    *_, last = events(client.post("/generate_stream", json={**ASKED, "parameters": {"details": True}}))
    assert last["details"]["finish_reason"] == "length"
    assert WORDS.startswith(last["generated_text"])
    chat = {"messages": [{"role": "user", "content": ASKED["inputs"]}], "stream": True}
    *_, last, done = events(client.post("/v1/chat/completions", json=chat))
    assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")


def test_the_platform_lets_one_header_through(client):
    response = client.post("/invocations", json=ASKED)
    assert response.headers["x-amzn-sagemaker-custom-attributes"] == "cut=deadline"
    short = client.post("/invocations", json={"inputs": "say:ok"})
    assert "x-amzn-sagemaker-custom-attributes" not in short.headers
    assert "x-response-cut" not in short.headers


def test_one_of_several_answers_may_be_empty(serve):
    server = serve(said={"response_deadline": 0.4}, max_rows=2, **BOUND)
    with server.bridge.submit(_long_request(server)):
        response = server.client.post("/v1/completions", json={"prompt": [ASKED["inputs"]] * 2, "max_tokens": 900})
    first, second = response.json["choices"]
    assert (first["text"][:4], first["finish_reason"]) == ("word", "length")
    assert (second["text"], second["finish_reason"]) == ("", "length")


def test_who_waits_in_the_queue_is_told_in_time(serve, events):
    server = serve(said={"response_deadline": 0.1, "stream_deadline": 0.1}, max_rows=1, **BOUND)
    with server.bridge.submit(_long_request(server)):
        whole = server.client.post("/generate", json={"inputs": "say:a"})
        assert (whole.status_code, whole.json["error_type"]) == (424, "generation")
        assert "no token" in whole.json["error"]
        [event] = events(server.client.post("/generate_stream", json={"inputs": "say:a"}))
        assert event["error_type"] == "generation"
        assert server.metric('tgi_request_failure{err="generation"}') == "2"


def _long_request(server):
    return server.bridge.loaded().validate(ASKED["inputs"], Parameters()).requests[0]


def test_without_a_deadline_nothing_is_cut(serve):
    response = serve(**BOUND).client.post("/generate", json={"inputs": "say:" + WORDS[:60]})
    assert response.json["generated_text"] == WORDS[:60]
    assert "x-response-cut" not in response.headers


def test_a_stream_that_is_cut_between_tokens_still_ends_with_an_event():
    token = OutputToken(id=7, text="word", logprob=-1.0, special=False)
    finish = Finish(reason=FinishReason.LENGTH, text="word", generated_tokens=1, queue_s=0.0, inference_s=0.0, cut=True)
    outputs = [RequestOutput(request_id=1, tokens=[token], text="word"), RequestOutput(request_id=1, finish=finish)]
    frames = list(_frames(iter([(0, output) for output in outputs]), None, "", details=False))
    last = json.loads(frames[-1].removeprefix(b"data: "))
    assert (last["index"], last["generated_text"]) == (2, "word")
    assert (last["token"]["text"], last["token"]["special"]) == ("", True)
