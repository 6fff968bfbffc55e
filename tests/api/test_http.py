"""What holds for every route: methods, names, health, identity and metrics."""

import json
import threading

import pytest

from serving.api import completions, openai
from serving.api.schemas import native


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
        ("GET", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET,HEAD"),
        ("PATCH", "/vertex", "POST"),
        ("GET", "/chat_tokenize", "POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client, method, path, allowed):
    response = client.open(path, method=method)
    assert (response.status_code, response.data) == (405, b"")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/info", "/metrics", "/v1/models", "/v1/models/demo/model"])
def test_what_can_be_got_can_be_asked_for_its_headers_only(client, path):
    response = client.head(path)
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers.get("content-type") == client.get(path).headers.get("content-type")


def answers(client):
    yield client.get("/health")
    yield client.get("/nowhere")
    yield client.put("/generate")
    yield client.options("/generate")
    yield client.post("/generate", data=b"{", content_type="application/json")
    yield client.post("/generate", json={"inputs": ""})
    yield client.post("/generate", json={"inputs": "x"})
    yield client.post("/generate_stream", json={"inputs": "x"})
    yield client.post("/v1/completions", json={"prompt": "x", "stream": True})


def test_names_of_headers_are_in_lower_case(client):
    for response in answers(client):
        assert [name for name, _ in response.headers if name != name.lower()] == []


def test_every_answer_bears_the_requests_name(client):
    for response in answers(client):
        assert response.headers["x-request-id"]
    assert client.get("/health", headers={"X-Request-Id": "mine: 7"}).headers["x-request-id"] == "mine: 7"
    names = {client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(names) == 3


@pytest.mark.parametrize("unfit", ["", "x" * 129, "é", "\x7f"])
def test_an_unfit_name_is_replaced(client, unfit):
    response = client.get("/health", headers={"X-Request-Id": unfit})
    assert response.headers["x-request-id"] not in ("", unfit)


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_is_an_empty_200(client, method, path):
    response = client.open(path, method=method)
    assert (response.status_code, response.data) == (200, b"")


def test_ping_may_be_posted(client):
    assert client.post("/ping").status_code == 200


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
        ("max_position_embeddings", 4096),
        ("num_shard", 1),
        ("weight_bytes", 0),
        ("kv_cache_bytes", 4 * 1024 * 8),
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
            ("/chat_tokenize", {"messages": []}),
            ("/vertex", {"instances": [{"inputs": "x"}]}),
        ):
            response = server.client.post(path, json=request)
            assert (response.status_code, response.json) == (
                503,
                {"error": "Model is loading", "error_type": "not_ready"},
            )
            assert int(response.headers["retry-after"]) > 0
        for path, request in (
            ("/v1/chat/completions", {"messages": [], "stream": True}),
            ("/v1/completions", {"prompt": "x", "stream": True}),
            ("/invocations", {"messages": []}),
            ("/invocations", {"prompt": "x"}),
        ):
            response = server.client.post(path, json=request)
            assert (response.status_code, response.json["error_type"]) == (503, "not_ready")
            assert response.json["error"]["type"] == "server_error"
        assert server.client.get("/v1/models").status_code == 200
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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 3}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3}),
        ("/v1/completions", {"prompt": "a", "logprobs": 3}),
    ],
)
def test_what_is_told_of_many_tokens_is_written_off_the_hub(monkeypatch, serve, path, body):
    server = serve(max_total_tokens=512, reply=lambda prompt: [65] * 400)
    threads = set()

    def rounded(value):
        threads.add(threading.get_ident())
        return value

    for module in (native, openai, completions):
        monkeypatch.setattr(module, "shortest", rounded)
    assert server.client.post(path, json=body).status_code == 200
    assert threads
    assert threading.get_ident() not in threads
