"""The API's own description: it says what the routes do, and no more."""

import json
import re

import jsonschema
import openapi_spec_validator
import pytest

from serving.api.docs import DOCS_FILES, PLAYGROUND_FILES
from serving.api.fields import MEANINGS, meaning_of
from serving.api.openapi import LIST_BOUNDS, document
from serving.api.operations import OPERATIONS

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
MODELS = {
    model["$ref"].rsplit("/", 1)[-1]
    for path in DOCUMENT["paths"].values()
    for operation in path.values()
    if "requestBody" in operation
    for schema in [operation["requestBody"]["content"]["application/json"]["schema"]]
    for model in schema.get("anyOf", [schema])
}
FIELDS = [
    (model, name, field)
    for model in sorted(MODELS | {"GenerateParameters", "StreamOptions"})
    for name, field in SCHEMAS[model]["properties"].items()
]
TINY = {"messages": [{"role": "user", "content": "say:a"}], "max_tokens": 2}


def complaints(value, schema) -> list[str]:
    whole = {**schema, "components": DOCUMENT["components"]}
    return [error.message for error in jsonschema.Draft202012Validator(whole).iter_errors(value)]


def schema_of(method, path, status, content_type="application/json"):
    return DOCUMENT["paths"][path][method]["responses"][str(status)]["content"][content_type]["schema"]


def test_it_is_valid():
    openapi_spec_validator.validate(DOCUMENT)


def test_every_route_is_described_and_nothing_else(server):
    routed = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in server.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, operations in DOCUMENT["paths"].items() for method in operations}
    assert described == routed


def test_it_is_served_as_it_is(client):
    response = client.get("/api-doc/openapi.json")
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.json == DOCUMENT


@pytest.mark.parametrize(("model", "name", "field"), [pytest.param(*each, id=".".join(each[:2])) for each in FIELDS])
def test_every_field_of_a_request_is_explained(model, name, field):
    assert field.get("description")


def test_no_words_are_left_of_fields_that_are_gone():
    known = {name for _, name, _ in FIELDS} | {f"{model}.{name}" for model, name, _ in FIELDS}
    assert set(MEANINGS) <= known


def test_integers_and_floats_have_the_bounds_of_their_types():
    parameters = SCHEMAS["GenerateParameters"]["properties"]
    assert parameters["seed"]["anyOf"][0] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**64}
    assert parameters["max_new_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**32}
    assert parameters["temperature"]["anyOf"][0]["maximum"] == pytest.approx(3.4028234663852886e38)
    assert parameters["do_sample"]["default"] is False
    assert SCHEMAS["GenerateRequest"]["required"] == ["inputs"]


def edges():
    for path, model, wrap in (
        (
            "/generate",
            "GenerateParameters",
            lambda given: {"inputs": "x", "parameters": {"max_new_tokens": 1, **given}},
        ),
        ("/v1/chat/completions", "ChatRequest", lambda given: {**TINY, **given}),
        ("/v1/completions", "CompletionRequest", lambda given: {"prompt": "x", "max_tokens": 2, **given}),
    ):
        for name in SCHEMAS[model]["properties"]:
            meaning = meaning_of(model, name)
            for keyword, bound in (meaning.bounds if meaning else {}).items():
                if keyword in LIST_BOUNDS:
                    continue
                outside = {"minimum": bound - 1, "maximum": bound + 1, "exclusiveMinimum": bound}[keyword]
                inside = {"minimum": bound, "maximum": bound, "exclusiveMinimum": bound + 0.25}[keyword]
                if name == "n" or (name == "best_of" and "Completion" in model):
                    inside = 1
                yield pytest.param(path, model, name, wrap, inside, outside, id=f"{model}.{name}.{keyword}")


@pytest.mark.parametrize(("path", "model", "name", "wrap", "inside", "outside"), list(edges()))
def test_bounds_are_the_validators(client, path, model, name, wrap, inside, outside):
    field = SCHEMAS[model]["properties"][name]
    refused = client.post(path, json=wrap({name: outside}))
    assert (refused.status_code, complaints(outside, field) != []) == (422, True)
    accepted = client.post(path, json=wrap({name: inside}))
    assert (accepted.status_code, complaints(inside, field)) == (200, []), accepted.data


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/chat/completions", {**TINY, "stop_token_ids": [1] * 129}),
        ("/v1/completions", {"prompt": []}),
        ("/vertex", {"instances": []}),
    ],
)
def test_what_the_schema_refuses_is_refused(client, path, body):
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert complaints(body, schema)
    assert client.post(path, json=body).status_code == 422


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.takes], ids=lambda each: each.name)
def test_examples_are_of_the_schema(operation):
    body = DOCUMENT["paths"][operation.path][operation.method]["requestBody"]["content"]["application/json"]
    assert body["examples"]
    for name, example in body["examples"].items():
        assert complaints(example["value"], body["schema"]) == [], name


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "say:ab", "parameters": {"details": True, "top_n_tokens": 2, "seed": 3}}),
        ("/generate", {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True, "details": True}}),
        ("/generate", {"inputs": "x", "parameters": {"decoder_input_details": True}}),
        ("/generate", {"inputs": "x", "parameters": {"temperature": 0}}),
        ("/", {"inputs": "say:ab"}),
        ("/tokenize", {"inputs": "ab"}),
        ("/chat_tokenize", TINY),
        ("/v1/chat/completions", {**TINY, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {**TINY, "n": 99}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "logprobs": 1, "echo": True}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/invocations", TINY),
        ("/vertex", {"instances": [{"inputs": "a"}]}),
        ("/vertex", {"instances": []}),
    ],
)
def test_answers_are_of_the_schema(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code in (200, 422)
    assert complaints(response.json, schema_of("post", path, response.status_code)) == []


@pytest.mark.parametrize("path", ["/info", "/v1/models", "/v1/models/tgi", "/v1/models/nobody"])
def test_answers_to_operators_are_of_the_schema(client, path):
    response = client.get(path)
    described = "/v1/models/{name}" if path.count("/") == 3 else path
    assert complaints(response.json, schema_of("get", described, response.status_code)) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate_stream", {"inputs": "say:ab", "parameters": {"details": True, "top_n_tokens": 2}}),
        ("/generate_stream", {"inputs": "x", "parameters": {"temperature": 0}}),
        ("/", {"inputs": "say:ab", "stream": True}),
        ("/v1/chat/completions", {**TINY, "stream": True, "logprobs": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True, "logprobs": 1}),
    ],
)
def test_events_are_of_the_schema(client, events, path, body):
    schema = schema_of("post", path, 200, "text/event-stream")
    data = schema["properties"]["data"]
    for payload in events(client.post(path, json=body)):
        text = payload if isinstance(payload, str) else json.dumps(payload)
        assert complaints({"data": text}, schema) == []
        if isinstance(payload, dict):
            described = data if "contentSchema" in data else data["anyOf"][1]
            assert complaints(payload, described["contentSchema"]) == []


@pytest.mark.parametrize(
    ("status", "data", "content_type"),
    [
        (400, b"{", "application/json"),
        (413, b'"' + b"x" * 600 + b'"', "application/json"),
        (415, b"{}", "text/plain"),
        (422, b"[]", "application/json"),
    ],
)
def test_refusals_have_the_described_content_type(serve, status, data, content_type):
    client = serve(payload_limit=500).client
    for path in ("/generate", "/v1/chat/completions"):
        response = client.post(path, data=data, content_type=content_type)
        assert response.status_code == status
        assert response.content_type in DOCUMENT["paths"][path]["post"]["responses"][str(status)]["content"]


def test_whole_answers_have_the_described_headers(client):
    for path, body in (("/generate", {"inputs": "x"}), ("/v1/chat/completions", TINY)):
        response = client.post(path, json=body)
        described = DOCUMENT["paths"][path]["post"]["responses"]["200"]["headers"]
        assert {name for name, _ in response.headers if name.startswith("x-")} >= set(described)


@pytest.mark.parametrize(("method", "path"), [("get", "/info"), ("post", "/generate"), ("get", "/v1/models")])
def test_without_the_key_the_answer_is_the_described_one(serve, method, path):
    response = serve(api_key="k").client.open(path, method=method, json={})
    assert response.status_code == 401
    assert complaints(response.json, schema_of(method, path, 401)) == []
    assert DOCUMENT["paths"][path][method]["security"] == [{}, {"key": []}]


def test_files_of_pages_are_named():
    named = {
        path: DOCUMENT["paths"][path]["get"]["parameters"][0]["schema"]["enum"]
        for path in ("/docs/{name}", "/playground/{name}")
    }
    assert named == {"/docs/{name}": list(DOCS_FILES), "/playground/{name}": list(PLAYGROUND_FILES)}
