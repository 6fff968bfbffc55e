"""What holds for every route: methods, CORS, the key, health, identity and metrics."""

import json
import threading

import pytest

ROUTES = [
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("POST", "/"),
    ("POST", "/ping"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/invocations"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
]
VARY = "origin, access-control-request-method, access-control-request-headers"


@pytest.mark.parametrize("path", ["/nowhere", "/generate/", "/v1", "/Generate"])
def test_an_unknown_path_is_answered_with_nothing(client, path):
    response = client.post(path, json={})
    assert (response.status_code, response.data) == (404, b"")
    assert "content-type" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", "POST"),
        ("PUT", "/", "GET,HEAD,POST"),
        ("POST", "/info", "GET,HEAD"),
        ("DELETE", "/v1/chat/completions", "POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client, method, path, allowed):
    response = client.open(path, method=method)
    assert (response.status_code, response.data) == (405, b"")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_is_an_empty_200(client, method, path):
    response = client.open(path, method=method)
    assert (response.status_code, response.data) == (200, b"")


def test_ping_may_be_posted(client):
    assert client.post("/ping").status_code == 200


def test_every_answer_may_be_read_by_browsers(client):
    for response in (client.get("/health"), client.post("/generate", json={}), client.get("/nowhere")):
        assert response.headers["access-control-allow-origin"] == "*"
        assert response.headers["vary"] == VARY


@pytest.mark.parametrize("path", ["/generate", "/nowhere"])
def test_preflights_are_answered_directly(serve, path):
    response = serve(api_key="k").client.options(path, headers={"origin": "https://a.example"})
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers["access-control-allow-methods"] == "GET,POST"
    assert response.headers["access-control-allow-headers"] == "content-type,authorization"
    assert response.headers["access-control-allow-origin"] == "*"


def test_named_origins_are_echoed_and_others_are_not(serve):
    client = serve(cors=("https://a.example", "https://b.example")).client
    allowed = client.get("/health", headers={"origin": "https://b.example"})
    other = client.get("/health", headers={"origin": "https://c.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://b.example"
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nowhere"), ("PUT", "/health")])
def test_the_key_guards_everything_that_is_not_public(serve, method, path):
    client = serve(api_key="gehéim").client
    response = client.open(path, method=method, json={"inputs": "x"})
    assert response.status_code == 401
    assert response.json == {"error": "Invalid or missing API key", "error_type": "unauthorized"}
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health_needs_no_key(serve, method, path):
    assert serve(api_key="k").client.open(path, method=method).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer Key", 200),
        ("bearer Key", 200),
        ("Bearer key", 401),
        ("Bearer Key2", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("Basic Key", 401),
        ("Key", 401),
        ("Bearer K\xe9y", 401),
        ("", 401),
    ],
)
def test_keys_are_compared_exactly(serve, header, status):
    response = serve(api_key="Key").client.get("/info", headers={"authorization": header})
    assert response.status_code == status


def test_info_has_the_original_keys_then_ours(client):
    response = client.get("/info")
    assert response.content_type == "application/json"
    assert json.loads(response.data, object_pairs_hook=list) == [
        ("model_id", "demo/model"),
        ("model_sha", None),
        ("model_pipeline_tag", None),
        ("max_concurrent_requests", 128),
        ("max_best_of", 3),
        ("max_stop_sequences", 4),
        ("max_input_tokens", 63),
        ("max_total_tokens", 64),
        ("validation_workers", 2),
        ("max_client_batch_size", 4),
        ("router", "weir"),
        ("version", "1.2.3"),
        ("sha", None),
        ("docker_label", None),
        ("model_dtype", "float32"),
        ("model_device_type", "cuda"),
        ("max_batch_size", 64),
        ("max_batch_prefill_tokens", 512),
        ("max_batch_total_tokens", 4092),
    ]


def test_metrics_count_what_happened(serve):
    server = serve()
    server.client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 3}})
    server.client.post("/generate", json={"inputs": "x", "parameters": {"top_k": 0}})
    server.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "say:a"}], "n": 2})
    response = server.client.get("/metrics")
    assert response.content_type == "text/plain; charset=utf-8"
    values = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line and not line.startswith("#"))
    assert float(values["tgi_request_count"]) == 3
    assert float(values["tgi_request_success"]) == 2
    assert float(values['tgi_request_failure{err="validation"}']) == 1
    assert float(values["tgi_request_generated_tokens_sum"]) == 3 + 4
    assert float(values["tgi_request_input_length_count"]) == 2
    assert float(values["tgi_request_duration_count"]) == 2


def test_while_the_model_loads_work_is_put_off_and_health_says_so(serve):
    gate = threading.Event()
    server = serve(ready=False, start_gate=gate)
    try:
        for path, request in (
            ("/generate", {"inputs": "x"}),
            ("/generate_stream", {"inputs": "x"}),
            ("/", {"inputs": "x", "stream": True}),
            ("/tokenize", {"inputs": "x"}),
        ):
            response = server.client.post(path, json=request)
            assert (response.status_code, response.json) == (
                503,
                {"error": "Model is loading", "error_type": "not_ready"},
            )
            assert int(response.headers["retry-after"]) > 0
        response = server.client.post("/v1/chat/completions", json={"messages": [], "stream": True})
        assert (response.status_code, response.json["error_type"]) == (503, "not_ready")
        assert response.json["error"]["type"] == "server_error"
        health = server.client.get("/ping")
        assert (health.status_code, health.json) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
    finally:
        gate.set()
    server.wait()
    assert server.client.get("/ping").status_code == 200


def test_while_draining_new_work_is_refused(serve):
    server = serve()
    server.bridge.drain(0)
    response = server.client.post("/generate_stream", json={"inputs": "x"})
    assert (response.status_code, response.json) == (
        503,
        {"error": "Server is shutting down", "error_type": "shutting_down"},
    )
    assert "retry-after" in response.headers
    assert server.client.get("/health").status_code == 503
