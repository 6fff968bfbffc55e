"""Bodies that cannot be read are refused as the original's framework does, and none of them is a fault."""

import io

import pytest

JSON = "application/json"
PARSE = "Failed to parse the request body as JSON: "
SHAPE = "Failed to deserialize the JSON body into the target type: "


def refused(response, status, text):
    assert response.status_code == status
    assert response.content_type == "text/plain; charset=utf-8"
    assert response.text.startswith(text)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/jsonlines", "application/x-json"])
def test_other_types_of_content(client, content_type):
    response = client.post("/generate", data=b'{"inputs":"x"}', content_type=content_type)
    refused(response, 415, "Expected request with `Content-Type: application/json`")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"]
)
def test_all_json_types_are_taken(client, content_type):
    assert client.post("/generate", data=b'{"inputs":"x"}', content_type=content_type).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"inputs":"x"}}',
        b'{"inputs":"x","parameters":{"temperature":NaN}}',
        b'{"inputs":"x","parameters":{"temperature":-Infinity}}',
        b'{"inputs":"x\xff"}',
        b'{"inputs":"\\ud800"}',
        b'{"inputs":"x","unknown":"\\uDFFF"}',
        b'{"inputs":"a\nb"}',
        b'{"inputs":"x","n":' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_no_json(client, body):
    refused(client.post("/generate", data=body, content_type=JSON), 400, PARSE)


def nested(depth):
    calls = b"[" * (depth - 5) + b"]" * (depth - 5)
    return b'{"messages":[{"role":"assistant","tool_calls":[{"x":' + calls + b"}]}]}"


def test_nesting_is_bounded(client):
    url = "/v1/chat/completions"
    assert client.post(url, data=nested(128), content_type=JSON).status_code == 200
    for depth in (129, 250, 900):
        refused(client.post(url, data=nested(depth), content_type=JSON), 400, PARSE + "recursion limit exceeded")


def test_a_parse_error_names_the_place(client):
    response = client.post("/generate", data=b'{"inputs":\n  oops}', content_type=JSON)
    assert response.text == PARSE + "Expecting value at line 2 column 3"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"[]", ""),
        (b"{}", "missing field `inputs`"),
        (b'{"inputs":["x"]}', "inputs: "),
        (b'{"inputs":"x","inputs":"y"}', "duplicate field `inputs`"),
        (b'{"inputs":"x","parameters":{"seed":1,"seed":1}}', "parameters: duplicate field `seed`"),
        (b'{"inputs":"x","parameters":null}', "parameters: "),
        (b'{"inputs":"x","parameters":{"top_k":1.0}}', "parameters.top_k: "),
        (b'{"inputs":"x","parameters":{"top_k":true}}', "parameters.top_k: "),
        (b'{"inputs":"x","parameters":{"top_k":2147483648}}', "parameters.top_k: "),
        (b'{"inputs":"x","parameters":{"temperature":true}}', "parameters.temperature: "),
        (b'{"inputs":"x","parameters":{"temperature":"1"}}', "parameters.temperature: "),
        (b'{"inputs":"x","parameters":{"temperature":1e39}}', "parameters.temperature: "),
        (b'{"inputs":"x","parameters":{"temperature":1e999}}', "parameters.temperature: "),
        (b'{"inputs":"x","parameters":{"temperature":1' + b"0" * 400 + b"}}", "parameters.temperature: "),
        (b'{"inputs":"x","parameters":{"max_new_tokens":-1}}', "parameters.max_new_tokens: "),
        (b'{"inputs":"x","parameters":{"max_new_tokens":4294967296}}', "parameters.max_new_tokens: "),
        (b'{"inputs":"x","parameters":{"seed":18446744073709551616}}', "parameters.seed: "),
        (b'{"inputs":"x","parameters":{"do_sample":null}}', "parameters.do_sample: "),
        (b'{"inputs":"x","parameters":{"do_sample":1}}', "parameters.do_sample: "),
        (b'{"inputs":"x","parameters":{"stop":null}}', "parameters.stop: "),
        (b'{"inputs":"x","parameters":{"stop":"x"}}', "parameters.stop: "),
        (b'{"inputs":"x","parameters":{"stop":["a",1]}}', "parameters.stop[1]: "),
    ],
)
def test_what_has_another_shape(client, body, detail):
    refused(client.post("/generate", data=body, content_type=JSON), 422, SHAPE + detail)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":"x","unknown":1,"unknown":2}',
        b'{"inputs":"x","unknown":{"a":1,"a":{}}}',
        b'{"inputs":"x","parameters":{"temperature":2,"seed":null,"best_of":null}}',
        b'{"inputs":"\\ud83d\\ude00"}',
    ],
)
def test_what_the_original_takes_is_taken(client, body):
    assert client.post("/generate", data=body, content_type=JSON).status_code == 200


def test_the_compatible_routes_stream_is_a_boolean(client):
    refused(client.post("/", json={"inputs": "x", "stream": None}), 422, SHAPE + "stream: ")


def test_a_body_at_the_limit_is_read_and_one_beyond_is_not(serve):
    client = serve(payload_limit=14).client
    assert client.post("/generate", data=b'{"inputs":"x"}', content_type=JSON).status_code == 200
    response = client.post("/generate", data=b'{"inputs":"xy"}', content_type=JSON)
    assert response.status_code == 413
    assert response.content_type == "text/plain; charset=utf-8"
    assert response.text == "Failed to buffer the request body: length limit exceeded"


def test_a_chunked_body_has_the_same_limit(serve):
    client = serve(payload_limit=14).client
    for body, status in ((b'{"inputs":"x"}', 200), (b'{"inputs":"xy"}', 413)):
        response = client.post(
            "/generate",
            input_stream=io.BytesIO(body),
            content_type=JSON,
            environ_overrides={"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
        )
        assert response.status_code == status


def test_long_bodies_are_refused_in_the_same_words(client):
    body = b'{"inputs":"x","parameters":{"stop":[' + b"1," * 20_000 + b"1]}}"
    refused(client.post("/generate", data=body, content_type=JSON), 422, SHAPE + "parameters.stop[0]: ")


def test_none_of_it_counts_as_a_request(serve):
    server = serve()
    server.client.post("/generate", data=b"{", content_type=JSON)
    server.client.post("/generate", data=b"{}", content_type=JSON)
    assert server.metric("tgi_request_count") in (None, "0.0", "0")
