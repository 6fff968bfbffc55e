"""What SageMaker's headers ask of `/invocations`: another route, a name, an adapter; and the small routes beside it."""

import pytest
from werkzeug.test import TestResponse

ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"
INFERENCE_ID = "X-Amzn-SageMaker-Inference-Id"
CHAT = {"messages": [{"role": "user", "content": "say:ok"}]}


@pytest.fixture(scope="module")
def server(serve_module):
    """A server whose answers do not begin with the prompt."""
    return serve_module(pipeline_tag="text2text-generation")


def routed(client, route: str, body, **options) -> TestResponse:
    return client.post("/invocations", json=body, headers={ATTRIBUTES: route}, **options)


@pytest.mark.parametrize(
    ("route", "body", "key"),
    [
        ("route=/v1/chat/completions", CHAT, "choices"),
        ("route=/v1/completions", {"prompt": "say:a"}, "choices"),
        ("trace=7, route=/generate", {"inputs": "say:a"}, "generated_text"),
        ("Route = /chat_tokenize;x=y", CHAT, "templated_text"),
        ("route=/vertex", {"instances": [{"inputs": "say:a"}]}, "predictions"),
    ],
)
def test_attributes_lead_to_another_route(client, route, body, key):
    response = routed(client, route, body)
    assert response.status_code == 200
    assert key in response.json


def test_a_routed_stream_streams(client, events):
    assert events(routed(client, "route=/generate_stream", {"inputs": "say:ab"}))[-1]["generated_text"] == "ab"


def test_a_routed_request_fails_in_the_routes_dialect(client):
    assert routed(client, "route=/v1/chat/completions", {**CHAT, "n": 0}).json["error"]["type"]
    assert isinstance(routed(client, "route=/generate", {"inputs": ""}).json["error"], str)


@pytest.mark.parametrize("route", ["/invocations", "/ping", "/metrics", "/v1/models", "/adapters", "/nowhere", ""])
def test_other_routes_are_refused_with_those_there_are(client, route):
    response = routed(client, f"route={route}", CHAT)
    assert (response.status_code, response.json["error_type"]) == (404, "unknown_route")
    assert "/v1/chat/completions" in response.json["error"]
    assert "/invocations" not in response.json["error"].partition("; ")[2]


def test_attributes_of_the_clients_own_change_nothing(client):
    response = routed(client, "c000b4f9-df62-4c85-a0bf-7c525f9104a4", {"inputs": "say:a"})
    assert response.json == [{"generated_text": "a"}]


def test_the_inference_id_is_the_requests_name(client):
    response = client.post("/invocations", json=CHAT, headers={INFERENCE_ID: "order-7"})
    assert response.headers["x-request-id"] == "order-7"
    headers = {INFERENCE_ID: "order-7", "x-request-id": "mine"}
    assert client.post("/invocations", json=CHAT, headers=headers).headers["x-request-id"] == "mine"


def test_nobody_is_served_the_base_model_in_place_of_an_adapter(client):
    response = client.post("/invocations", json=CHAT, headers={ADAPTER: "fine-tuned"})
    assert (response.status_code, response.json["error_type"]) == (404, "adapter_not_found")
    assert "fine-tuned" in response.json["error"]
    named = client.post("/invocations", json={"inputs": "x", "parameters": {"adapter_id": "fine-tuned"}})
    assert named.status_code == 422
    assert client.post("/invocations", json=CHAT, headers={ADAPTER: ""}).status_code == 200


def test_a_batch_transform_is_told_how_to_ask(serve):
    small = serve(max_rows=4)
    assert small.client.get("/execution-parameters").json == {
        "MaxConcurrentTransforms": 64,
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": 1,
    }
    large = serve(payload_limit=25 * 2**20, said={"max_concurrent_requests": 3})
    asked = large.client.get("/execution-parameters").json
    assert (asked["MaxConcurrentTransforms"], asked["MaxPayloadInMB"]) == (3, 25)
    huge = serve(payload_limit=25 * 2**20).client.get("/execution-parameters").json
    assert huge["MaxConcurrentTransforms"] * huge["MaxPayloadInMB"] <= 100


@pytest.mark.parametrize("method", ["get", "head", "post"])
def test_ping_answers_every_way_in_which_it_is_asked(client, method):
    response = getattr(client, method)("/ping")
    assert (response.status_code, response.data) == (200, b"")
