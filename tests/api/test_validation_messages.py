"""Every rule is told in the original's words, in the original's order."""

import pytest

STREAM_ONLY = [
    ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
    ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    (
        {"best_of": 9, "decoder_input_details": True, "temperature": 0},
        "`best_of` != 1 is not supported when streaming tokens",
    ),
]
RULES = [
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -0.5}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.5}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.01}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 63. Given: 0"),
    ({"truncate": 64}, "`truncate` must be strictly positive and less than 63. Given: 64"),
    (
        {"max_new_tokens": 63},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 2 `inputs` tokens and 63 `max_new_tokens`",
    ),
    (
        {"max_new_tokens": 100_000},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 2 `inputs` tokens and 100000 `max_new_tokens`",
    ),
    ({"grammar": {"type": "regex", "value": "a"}}, "grammar is not supported"),
    # Ours
    ({"adapter_id": "mine"}, "unknown adapter `mine`"),
    ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"stop": ["x" * 4097]}, "`stop` sequences must have at most 4096 characters"),
    ({"stop_token_ids": [1] * 129}, "`stop_token_ids` must have at most 128 entries"),
    ({"stop_token_ids": [258]}, "`stop_token_ids` must be < 258"),
    # Order
    ({"temperature": 0, "repetition_penalty": 0}, "`temperature` must be strictly positive"),
    ({"frequency_penalty": 3, "top_p": 0}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"typical_p": 0, "top_k": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"max_new_tokens": 0, "stop": list("abcde")}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde"), "top_n_tokens": 9}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"grammar": {"type": "regex", "value": "a"}, "max_new_tokens": 63},
     "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 2 `inputs` tokens and 63 `max_new_tokens`"),
]  # fmt: skip
WHOLE_ONLY = [
    ({"best_of": 4}, "`best_of` must be > 0 and <= 3. Given: 4"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "temperature": 0}, "`temperature` must be strictly positive"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"best_of": 2, "top_k": 3, "seed": 1, "top_n_tokens": 9}, "`seed` must not be set when `best_of` > 1"),
]


def envelope(detail):
    return {"error": f"Input validation error: {detail}", "error_type": "validation"}


@pytest.mark.parametrize(("parameters", "detail"), RULES + WHOLE_ONLY)
@pytest.mark.parametrize("path", ["/generate", "/", "/invocations"])
def test_whole_answers(client, path, parameters, detail):
    response = client.post(path, json={"inputs": "x", "parameters": parameters})
    assert response.status_code == 422
    assert response.json == envelope(detail)


@pytest.mark.parametrize(("parameters", "detail"), RULES + STREAM_ONLY)
def test_streams_tell_it_in_an_event_under_status_200(client, events, parameters, detail):
    response = client.post("/generate_stream", json={"inputs": "x", "parameters": parameters})
    assert response.status_code == 200
    assert response.headers["x-compute-characters"] == "1"
    assert events(response) == [envelope(detail)]


def test_streams_tell_it_by_status_on_request(client):
    request = {"inputs": "x", "parameters": {"top_k": 0}}
    response = client.post("/generate_stream", json=request, headers={"X-Strict-Status": "true"})
    assert response.status_code == 422
    assert response.json == envelope("`top_k` must be strictly positive")


@pytest.mark.parametrize(
    ("inputs", "parameters", "detail"),
    [
        ("", {}, "`inputs` cannot be empty"),
        ("", {"truncate": 0}, "`inputs` cannot be empty"),
        ("x" * 63, {}, "`inputs` must have less than 63 tokens. Given: 64"),
        (
            "x" * 64,
            {},
            "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 65 `inputs` tokens and 0 `max_new_tokens`",
        ),
        ("<beyond>", {}, "`inputs` contains a token that the model does not know"),
    ],
)
def test_prompts(client, inputs, parameters, detail):
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert (response.status_code, response.json) == (422, envelope(detail))


def test_best_of_where_the_operator_allows_none(serve):
    response = serve(max_best_of=1).client.post("/generate", json={"inputs": "x", "parameters": {"best_of": 2}})
    assert response.json == envelope("`best_of` != 1 is not allowed for this endpoint")


def test_limits_themselves_are_allowed(client):
    parameters = {"max_new_tokens": 62, "top_n_tokens": 5, "stop": list("abcd"), "truncate": 63, "frequency_penalty": 2}
    assert client.post("/generate", json={"inputs": "x", "parameters": parameters}).status_code == 200


def test_a_permit_comes_before_the_checks_of_values(serve):
    server = serve(permits=1)
    with server.bridge.permit():
        late = server.client.post("/generate", json={"inputs": "x", "parameters": {"top_k": 0}})
        early = server.client.post("/generate", json={"inputs": "x", "parameters": {"best_of": 4}})
    assert (late.status_code, early.status_code) == (429, 422)
    assert server.bridge.open_requests == 0
