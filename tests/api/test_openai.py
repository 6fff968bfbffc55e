"""OpenAI's chat route: shapes, mended semantics and errors."""

import threading

import httpx2
import openai
import pytest

URL = "/v1/chat/completions"


def chat(text="Hi", **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def error(response):
    return response.json["error"]


def test_a_chat_is_answered_in_the_original_key_order(client):
    response = client.post(URL, json=chat("say:hé", seed=1))
    assert response.status_code == 200
    whole = response.json
    assert whole.pop("id").startswith("chatcmpl-")
    assert isinstance(whole.pop("created"), int)
    assert list(response.json) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert whole == {
        "object": "chat.completion",
        "model": "demo/model",
        "system_fingerprint": "1.2.3-native",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hé"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 25, "completion_tokens": 4, "total_tokens": 29},
    }
    assert response.headers["x-prompt-tokens"] == "25"
    assert response.headers["x-compute-characters"] == "24"


def test_ids_are_unique(client):
    assert client.post(URL, json=chat()).json["id"] != client.post(URL, json=chat()).json["id"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [(None, "demo/model"), ("", "demo/model"), ("tgi", "demo/model"), ("demo/model",) * 2, ("gpt-4", "gpt-4")],
)
def test_any_model_name_is_served_and_echoed(client, asked, named):
    assert client.post(URL, json=chat(model=asked)).json["model"] == named


def test_a_name_without_end_is_not_said_back_in_every_chunk(client, events):
    *chunks, _ = events(client.post(URL, json=chat("say:ab", model="m" * 10_000, stream=True)))
    assert {chunk["model"] for chunk in chunks} == {"m" * 256}


def test_a_stream_has_chunks_a_finish_and_an_end(client, events):
    response = client.post(URL, json=chat("say:ab", stream=True))
    assert response.status_code == 200
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({chunk.pop("id") for chunk in chunks}) == 1
    created = {chunk.pop("created") for chunk in chunks}
    assert len(created) == 1
    fixed = {"object": "chat.completion.chunk", "model": "demo/model", "system_fingerprint": "1.2.3-native"}
    assert chunks == [
        {
            **fixed,
            "choices": [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": content},
                    "logprobs": None,
                    "finish_reason": reason,
                }
            ],
            "usage": None,
        }
        for content, reason in [("a", None), ("b", None), ("", "stop")]
    ]


def test_usage_comes_last_and_only_when_asked_for(client, events):
    *chunks, last, _ = events(
        client.post(URL, json=chat("say:ab", stream=True, stream_options={"include_usage": True}))
    )
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 24, "completion_tokens": 3, "total_tokens": 27}
    assert all(chunk["usage"] is None for chunk in chunks)
    *chunks, _ = events(client.post(URL, json=chat("say:ab", stream=True, stream_options=None)))
    assert all(chunk["choices"] for chunk in chunks)


def test_logprobs_are_given_token_by_token(client, events):
    asked = chat("say:a", logprobs=True, top_logprobs=1)
    whole = client.post(URL, json=asked).json["choices"][0]["logprobs"]
    assert [token["token"] for token in whole["content"]] == ["a", "</s>"]
    assert whole["content"][0]["top_logprobs"] == [
        {"token": "a", "logprob": whole["content"][0]["logprob"]}
    ]  # fmt: skip
    *chunks, _ = events(client.post(URL, json={**asked, "stream": True}))
    assert [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks] == [[token] for token in whole["content"]]


def test_alternatives_without_log_probabilities_are_not_shown(client):
    response = client.post(URL, json=chat("say:a", top_logprobs=2))
    assert response.status_code == 200
    assert response.json["choices"][0]["logprobs"] is None


def test_variables_for_the_template_reach_it(serve):
    server = serve(template="{{ 'say:yes' if enable_thinking else 'say:no' }}\n")
    for wanted, said in ((True, "yes"), (False, "no")):
        whole = server.client.post(URL, json=chat(chat_template_kwargs={"enable_thinking": wanted})).json
        assert whole["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize("stop", ["el", ["el"], ["zz", "el"]])
def test_stop_text_is_removed_and_its_beginning_held_back(client, events, stop):
    whole = client.post(URL, json=chat("say:hello", stop=stop)).json["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("h", "stop")
    *chunks, _ = events(client.post(URL, json=chat("say:hello", stop=stop, stream=True)))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "h"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_text_stays_on_request(client):
    whole = client.post(URL, json=chat("say:hello", stop="el", include_stop_str_in_output=True)).json
    assert whole["choices"][0]["message"]["content"] == "hel"


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 5, "max_completion_tokens": 2}]
)
def test_either_name_of_the_length_counts_and_the_newer_wins(client, fields):
    whole = client.post(URL, json=chat("say:abcdef", **fields)).json
    assert whole["choices"][0]["message"]["content"] == "ab"
    assert whole["choices"][0]["finish_reason"] == "length"


def test_several_answers(client, events):
    whole = client.post(URL, json=chat("say:ab", n=3, seed=5)).json
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert whole["usage"] == {"prompt_tokens": 24, "completion_tokens": 9, "total_tokens": 33}
    *chunks, usage, done = events(
        client.post(URL, json=chat("say:ab", n=2, stream=True, stream_options={"include_usage": True}))
    )
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == 6
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in own) == "ab"
        assert own[-1]["finish_reason"] == "stop"


def test_each_of_several_answers_takes_a_permit(serve):
    server = serve(permits=2)
    response = server.client.post(URL, json=chat(n=3))
    assert response.status_code == 429
    assert server.bridge.open_requests == 0


@pytest.fixture
def sampling_of(serve):
    """A function that gives the sampling parameters that the device got for a chat."""
    seen = []
    server = serve(bad_choice=lambda row, choice: seen.append(server.runner.rows[row.sequence_id].sampling) or choice)

    def ask(**fields):
        seen.clear()
        assert server.client.post(URL, json=chat(**fields)).status_code == 200
        return {sampling.seed: sampling for sampling in seen}

    return ask


def test_a_chat_draws_unless_the_temperature_is_zero(sampling_of):
    (default,) = sampling_of().values()
    (greedy,) = sampling_of(temperature=0, top_p=0.5).values()
    (warm,) = sampling_of(temperature=0.25).values()
    assert (default.do_sample, default.temperature) == (True, 1.0)
    assert (greedy.do_sample, greedy.temperature, greedy.top_p) == (False, 1.0, 1.0)
    assert (warm.do_sample, warm.temperature) == (True, 0.25)


def test_penalties_and_biases_are_openais(sampling_of):
    (sampling,) = sampling_of(
        frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={"7": -100, "8": 1.5}, top_p=1.0, min_p=0.1
    ).values()
    assert sampling.frequency_penalty == 0.5
    assert sampling.presence_penalty == -0.5
    assert sampling.relative_frequency_penalty == 0
    assert sampling.repetition_penalty == 1
    assert sampling.logit_bias == {7: -100.0, 8: 1.5}
    assert (sampling.top_p, sampling.min_p) == (1.0, 0.1)


def test_the_original_list_of_biases_is_void(sampling_of):
    (sampling,) = sampling_of(logit_bias=[1.0, 2.0]).values()
    assert sampling.logit_bias == {}


def test_the_first_of_several_answers_has_the_seed_itself(sampling_of):
    once, again = list(sampling_of(n=3, seed=5)), list(sampling_of(n=3, seed=5))
    assert once == again
    assert once[0] == 5
    assert len(set(once)) == 3


def test_harmless_fields_are_accepted(client):
    asked = chat(
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        user="me",
        response_format={"type": "text"},
        unknown=[{}],
    )
    assert client.post(URL, json=asked).status_code == 200


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "sa"}, {"type": "text", "text": "y:xy"}]
    assert client.post(URL, json=chat(parts)).json["choices"][0]["message"]["content"] == "xy"


def test_a_conversation_with_tool_messages_is_rendered(client):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {"role": "tool", "content": "say:z", "tool_call_id": "1"},
    ]
    assert client.post(URL, json={"messages": messages}).json["choices"][0]["message"]["content"] == "z"


def test_a_last_message_of_the_assistant_is_continued(client):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "say:on"}]
    response = client.post(URL, json={"messages": messages})
    assert response.headers["x-compute-characters"] == str(len("<user>a\n<assistant>say:on"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"presence_penalty": 2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"n": 0}, "`n` must be > 0 and <= 3. Given: 0"),
        ({"n": 4}, "`n` must be > 0 and <= 3. Given: 4"),
        ({"top_logprobs": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"logit_bias": {"x": 1}}, "`logit_bias` keys must be token ids < 258"),
        ({"logit_bias": {"258": 1}}, "`logit_bias` keys must be token ids < 258"),
        ({"logit_bias": {"1": 101}}, "`logit_bias` values must be >= -100.0 and <= 100.0"),
        (
            {"logit_bias": {str(i): 1 for i in range(1025)}},
            "`logit_bias` must have at most 1024 entries",
        ),
        ({"response_format": {"type": "json_object"}}, "grammar is not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_wrapped_and_have_a_real_status(client, fields, message, stream):
    response = client.post(URL, json=chat(stream=stream, **fields))
    assert response.status_code == 422
    assert response.json == {
        "error": {
            "message": f"Input validation error: {message}",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        },
        "error_type": "validation",
    }


def test_images_are_refused(client):
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    assert (
        error(client.post(URL, json=chat(image)))["message"]
        == "Input validation error: image modality is not supported"
    )


def test_links_in_text_are_only_text(client):
    text = "![](http://127.0.0.1:1/x.png)\nsay:ok"
    assert client.post(URL, json=chat(text)).json["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "Template error: template not found"),
        ("{{ raise_exception('roles must alternate') }}", "Template error: roles must alternate"),
        ("{{ messages[0].content.x.y }}", "Template error: 'str object' has no attribute 'x'"),
        ("{{ ''.__class__.__mro__ }}", "Template error: access to attribute '__class__' of 'str' object is unsafe."),
    ],
)
def test_template_errors(serve, template, message):
    response = serve(template=template).client.post(URL, json=chat())
    assert response.status_code == 422
    assert response.json["error_type"] == "template_error"
    assert error(response)["message"] == message


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"messages": None},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        chat(stop=[1]),
        chat(max_tokens=1.0),
        chat(stream=None),
        chat(logit_bias={"1": True}),
        chat(response_format={}),
    ],
)
def test_other_shapes_are_refused_by_the_framework(client, broken):
    response = client.post(URL, json=broken)
    assert response.status_code == 422
    assert response.content_type == "text/plain; charset=utf-8"
    assert response.text.startswith("Failed to deserialize the JSON body into the target type: ")


class TestOpenAIClient:
    """OpenAI's own client, without a network."""

    @pytest.fixture
    def connect(self):
        """A function that makes a client of a server."""
        clients = []

        def connect(server, key="-"):
            transport = httpx2.WSGITransport(app=server.app)
            clients.append(
                openai.OpenAI(
                    base_url="http://weir/v1",
                    api_key=key,
                    max_retries=0,
                    http_client=httpx2.Client(transport=transport),
                )
            )
            return clients[-1].chat.completions.create

        yield connect
        for client in clients:
            client.close()

    def test_an_answer(self, connect, server):
        answer = connect(server)(model="tgi", logprobs=True, top_logprobs=1, **chat("say:hé"))
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hé", "stop")
        assert choice.message.tool_calls is None
        assert choice.logprobs.content[-1].top_logprobs[0].token == "</s>"
        assert choice.logprobs.content[0].bytes is None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4

    def test_a_stream(self, connect, server):
        options = {"include_usage": True}
        *chunks, last = connect(server)(model="tgi", stream=True, stream_options=options, **chat("say:ab"))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "ab"
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert (last.choices, last.usage.completion_tokens) == ([], 3)

    @pytest.mark.parametrize(
        ("fields", "kind"),
        [({"temperature": -1}, openai.UnprocessableEntityError), ({"messages": None}, openai.UnprocessableEntityError)],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_wrong_with_a_request(self, connect, server, fields, kind, stream):
        with pytest.raises(kind):
            connect(server)(model="tgi", stream=stream, **{**chat(), **fields})

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_wrong_key(self, connect, serve, stream):
        server = serve(api_key="right")
        with pytest.raises(openai.AuthenticationError):
            connect(server, "wrong")(model="tgi", stream=stream, **chat())
        assert connect(server, "right")(model="tgi", **chat("say:a")).choices[0].message.content == "a"

    @pytest.mark.parametrize("stream", [False, True])
    def test_too_many_requests(self, connect, serve, stream):
        server = serve(permits=1)
        with pytest.raises(openai.RateLimitError) as caught:
            connect(server)(model="tgi", n=2, stream=stream, **chat())
        assert caught.value.response.headers["retry-after"]
        assert caught.value.type == "rate_limit_error"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_model_that_is_not_loaded(self, connect, serve, stream):
        gate = threading.Event()
        server = serve(ready=False, start_gate=gate)
        try:
            with pytest.raises(openai.InternalServerError, match="Model is loading"):
                connect(server)(model="tgi", stream=stream, **chat())
        finally:
            gate.set()

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_generation_that_fails_at_once(self, connect, serve, stream):
        server = serve(bad_choice=lambda row, choice: None)
        with pytest.raises(openai.APIStatusError, match="Request failed during generation") as caught:
            connect(server)(model="tgi", stream=stream, **chat())
        assert caught.value.status_code == 424

    def test_a_generation_that_fails_later(self, connect, serve):
        server = serve(bad_choice=lambda row, choice: None if row.position > 30 else choice)
        stream = connect(server)(model="tgi", stream=True, **chat("say:abcdefghijkl"))
        assert next(stream).choices[0].delta.content == "a"
        with pytest.raises(openai.APIError, match="Request failed during generation"):
            list(stream)
