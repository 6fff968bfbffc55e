"""OpenAI's older route: prompts of every kind, several answers, log probabilities, and errors."""

import pytest

URL = "/v1/completions"


def asked(prompt="say:ab", **fields):
    return {"prompt": prompt, **fields}


def test_a_prompt_is_answered_in_the_original_key_order(client):
    response = client.post(URL, json=asked("say:hé", seed=1))
    assert response.status_code == 200
    whole = response.json
    assert list(whole) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert whole.pop("id").startswith("cmpl-")
    assert isinstance(whole.pop("created"), int)
    assert whole == {
        "object": "text_completion",
        "model": "demo/model",
        "system_fingerprint": "1.2.3-native",
        "choices": [{"index": 0, "text": "hé", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12},
    }
    assert list(whole["choices"][0]) == ["index", "text", "logprobs", "finish_reason"]
    assert response.headers["x-compute-characters"] == "6"
    assert response.headers["x-prompt-tokens"] == "8"
    assert response.headers["x-generated-tokens"] == "4"
    assert float(response.headers["x-compute-time"]) > 0


def test_the_model_is_always_the_served_one(client):
    assert client.post(URL, json=asked(model="gpt-3.5-turbo-instruct")).json["model"] == "demo/model"


def test_several_prompts_are_answered_in_their_order(client):
    response = client.post(URL, json=asked(["say:a", "say:bcd", "x"]))
    assert [(choice["index"], choice["text"]) for choice in response.json["choices"]] == [
        (0, "a"),
        (1, "bcd"),
        (2, " world"),
    ]
    assert response.json["usage"] == {"prompt_tokens": 6 + 8 + 2, "completion_tokens": 2 + 4 + 7, "total_tokens": 29}
    assert response.headers["x-prompt-tokens"] == "16"
    assert response.headers["x-compute-characters"] == str(len("say:asay:bcdx"))


TOKENS_OF = {"say:a": [82, 64, 88, 25, 64], "say:bc": [82, 64, 88, 25, 65, 66]}


@pytest.mark.parametrize(
    ("prompt", "texts", "prompt_tokens"),
    [
        (TOKENS_OF["say:a"], ["a"], 5),
        ([TOKENS_OF["say:a"]], ["a"], 5),
        ([TOKENS_OF["say:a"], TOKENS_OF["say:bc"]], ["a", "bc"], 11),
        ([256, *TOKENS_OF["say:a"]], ["a"], 6),
        ("say:a", ["a"], 6),
    ],
)
def test_token_ids_are_taken_as_they_are(client, prompt, texts, prompt_tokens):
    response = client.post(URL, json=asked(prompt))
    assert [choice["text"] for choice in response.json["choices"]] == texts
    assert response.json["usage"]["prompt_tokens"] == prompt_tokens


def test_each_prompt_has_n_answers(client):
    response = client.post(URL, json=asked(["say:a", "say:bc"], n=2, seed=3))
    assert [(choice["index"], choice["text"]) for choice in response.json["choices"]] == [
        (0, "a"),
        (1, "a"),
        (2, "bc"),
        (3, "bc"),
    ]
    assert response.json["usage"] == {"prompt_tokens": 13, "completion_tokens": 2 * 2 + 2 * 3, "total_tokens": 23}


def by_sequence(row, choice):
    """A choice whose logprob depends on the sequence, so that some answers are better than others."""
    return type(choice)(token_id=choice.token_id, logprob=-float(row.sequence_id % 3 + 1), top=choice.top)


def test_the_n_best_of_several_are_given(serve):
    body = asked("say:a", n=2, best_of=3, logprobs=0)
    response = serve(bad_choice=by_sequence).client.post(URL, json=body)
    choices = response.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert [choice["logprobs"]["token_logprobs"][0] for choice in choices] == [-1, -2]
    assert response.json["usage"]["completion_tokens"] == 3 * 2, "all of them were made"


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"max_tokens": 2}, "he", "length"),
        ({"stop": "l"}, "he", "stop"),
        ({"stop": ["zz", "el"]}, "h", "stop"),
        ({"stop": "el", "include_stop_str_in_output": True}, "hel", "stop"),
        ({"stop_token_ids": [75]}, "he", "stop"),
        ({}, "hello", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_ends_have_openais_words_whole_and_streamed(client, events, fields, text, reason, stream):
    response = client.post(URL, json=asked("say:hello", stream=stream, **fields))
    if not stream:
        (choice,) = response.json["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, reason)
        return
    *chunks, done = events(response)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == text
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [reason]


def test_a_stream_tells_each_answers_usage_with_its_end(client, events):
    response = client.post(URL, json=asked(["say:a", "say:bc"], stream=True))
    assert response.headers["x-compute-characters"] == "11"
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" and chunk["model"] == "demo/model" for chunk in chunks)
    for index, text, usage in ((0, "a", (6, 2, 8)), (1, "bc", (7, 3, 10))):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["choices"][0]["text"] for chunk in own) == text
        assert all("usage" not in chunk for chunk in own[:-1])
        assert tuple(own[-1]["usage"].values()) == usage


def test_usage_of_a_whole_stream_comes_last_when_asked_for(client, events):
    body = asked(["say:a", "say:bc"], n=2, stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events(client.post(URL, json=body))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 13, "completion_tokens": 10, "total_tokens": 23}
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1, 2, 3}


def test_an_answer_that_waits_does_not_hold_up_its_siblings(serve, events):
    client = serve(max_rows=1).client
    *chunks, _ = events(client.post(URL, json=asked("say:abc", n=2, stream=True)))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0] * 4 + [1] * 4


@pytest.fixture
def sampling_of(serve):
    """A function that gives the sampling parameters that the device got for a request."""
    seen = []
    server = serve(bad_choice=lambda row, choice: seen.append(server.runner.rows[row.sequence_id].sampling) or choice)

    def ask(**fields):
        seen.clear()
        assert server.client.post(URL, json=asked(**fields)).status_code == 200
        return seen[0]

    return ask


def test_sampling_is_openais(sampling_of):
    plain = sampling_of()
    assert (plain.do_sample, plain.temperature, plain.repetition_penalty) == (True, 1, 1)
    greedy = sampling_of(temperature=0, top_p=0.5, min_p=0.2, n=2)
    assert (greedy.do_sample, greedy.top_p, greedy.min_p) == (False, 1, 0)
    full = sampling_of(
        temperature=0.5,
        top_p=1.0,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=-0.25,
        logit_bias={"9": -100},
    )
    assert (full.do_sample, full.temperature, full.top_p, full.min_p, full.seed) == (True, 0.5, 1, 0.1, 7)
    assert (full.repetition_penalty, full.frequency_penalty, full.presence_penalty) == (1.5, 0.25, -0.25)
    assert full.relative_frequency_penalty == 0
    assert full.logit_bias == {9: -100}


def test_nulls_are_defaults_and_unknown_fields_harmless(client):
    nulls = dict.fromkeys(["model", "max_tokens", "temperature", "n", "best_of", "logprobs", "echo", "stop", "seed"])
    body = asked("say:a", **nulls, suffix=None, logit_bias=None, stream_options=None, user="me", unknown=[{}])
    assert client.post(URL, json=body).json["choices"][0]["text"] == "a"


VALIDATION = "Input validation error: "


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"suffix": "x"},
            "suffix not supported",
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
        ),
        (
            {"prompt": ["x"] * 5},
            "batch size exceeded",
            "Number of prompts exceeds the maximum allowed batch size of 4",
        ),
        (
            {"prompt": ["x"] * 5, "suffix": ""},
            "suffix not supported",
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
        ),
        ({"prompt": ""}, "validation", VALIDATION + "`inputs` cannot be empty"),
        ({"prompt": ["x", ""]}, "validation", VALIDATION + "`inputs` cannot be empty"),
        ({"prompt": [[]]}, "validation", VALIDATION + "`inputs` cannot be empty"),
        ({"prompt": [1, 258]}, "validation", VALIDATION + "`inputs` contains a token that the model does not know"),
        ({"prompt": [2**32 - 1]}, "validation", VALIDATION + "`inputs` contains a token that the model does not know"),
        (
            {"prompt": [1] * 63 + [2]},
            "validation",
            VALIDATION + "`inputs` must have less than 63 tokens. Given: 64",
        ),
        ({"n": 0}, "validation", VALIDATION + "`n` must be > 0 and <= 3. Given: 0"),
        ({"n": 4}, "validation", VALIDATION + "`n` must be > 0 and <= 3. Given: 4"),
        ({"n": 2, "best_of": 1}, "validation", VALIDATION + "`best_of` must be >= `n`. Given: 1 and 2"),
        ({"best_of": 0}, "validation", VALIDATION + "`best_of` must be >= `n`. Given: 0 and 1"),
        ({"logprobs": 6}, "validation", VALIDATION + "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"max_tokens": 0}, "validation", VALIDATION + "`max_new_tokens` must be strictly positive"),
        ({"presence_penalty": 3}, "validation", VALIDATION + "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ],
)
@pytest.mark.parametrize("path", [URL, "/invocations"])
def test_errors_are_wrapped_as_openai_does(client, path, fields, kind, message):
    response = client.post(path, json={**asked(), **fields})
    assert (response.status_code, response.content_type) == (422, "application/json")
    assert response.json == {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None},
        "error_type": kind,
    }


def test_more_than_the_operator_allows_is_refused_before_anything_is_taken(serve):
    server = serve(permits=1)
    with server.bridge.permit():
        assert server.client.post(URL, json=asked(["x"] * 5)).status_code == 422
        assert server.client.post(URL, json=asked("x")).status_code == 429
    assert float(server.metric("tgi_request_count")) == 2
    assert float(server.metric('tgi_request_failure{err="validation"}')) == 1


@pytest.mark.parametrize("fields", [{"best_of": 9}, {"best_of": 3, "stream": True}, {"best_of": 2, "stream": True}])
def test_best_of_has_its_limits(client, fields):
    response = client.post(URL, json=asked(**fields))
    assert response.status_code == 422
    assert response.json["error"]["message"].startswith(VALIDATION + "`best_of`")


def test_best_of_that_is_n_may_stream(client):
    assert client.post(URL, json=asked(n=2, best_of=2, stream=True)).status_code == 200


@pytest.mark.parametrize(("prompts", "n", "status"), [(2, 2, 200), (4, 1, 200), (3, 2, 429)])
def test_every_answer_of_every_prompt_takes_a_permit(serve, prompts, n, status):
    server = serve(permits=4)
    response = server.client.post(URL, json=asked(["say:a"] * prompts, n=n))
    assert response.status_code == status
    assert server.bridge.open_requests == 0
    if status == 429:
        assert response.json["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1


def test_one_prompt_that_fails_fails_them_all(serve):
    server = serve(bad_choice=lambda row, choice: None if row.sequence_id % 3 == 1 else choice, permits=3)
    response = server.client.post(URL, json=asked(["say:abc", "say:b", "say:c"]))
    assert (response.status_code, response.json["error_type"]) == (424, "generation")
    assert server.bridge.open_requests == 0


def test_an_abandoned_stream_gives_every_permit_back(serve):
    server = serve(delay_s=0.002)
    body = asked(["x", "y"], n=2, ignore_eos=True, stream=True)
    response = server.client.post(URL, json=body, buffered=False)
    next(response.iter_encoded())
    assert server.bridge.open_requests == 4
    response.close()
    assert server.bridge.open_requests == 0


SHAPE = "Failed to deserialize the JSON body into the target type: "


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "missing field `prompt`"),
        ({"prompt": []}, "prompt: Empty array detected. Do not use an empty array for the prompt."),
        ({"prompt": None}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [1, [1]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [["x"]]}, "prompt"),
        (asked(stop=[1]), "stop"),
        (asked(stream=None), "stream"),
        (asked(logprobs=True), "logprobs"),
        (asked(max_tokens=1.0), "max_tokens"),
    ],
)
def test_other_shapes_are_refused_by_the_framework(client, body, detail):
    response = client.post(URL, json=body)
    assert (response.status_code, response.content_type) == (422, "text/plain; charset=utf-8")
    assert response.text.startswith(SHAPE + detail)
