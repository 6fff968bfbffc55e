"""Traces: where they go, and what of a request is said in them."""

import json

import pytest

from serving.errors import ConfigurationError
from serving.protocol import FirstToken, Grammar, GrammarKind, SamplingParams
from serving.telemetry.journal import GenerationRecord, RequestRecord
from serving.telemetry.tracing import is_http, request_attributes


@pytest.mark.parametrize(
    ("endpoint", "http"),
    [
        ("http://localhost:4317", False),
        ("https://collector.example:443", False),
        ("localhost:4317", False),
        ("http://[::1]:4317", False),
        ("http://localhost:4318", True),
        ("localhost:4318", True),
        ("https://collector.example/v1/traces", True),
        ("http://localhost:80/otel/v1/traces/", True),
    ],
)
def test_the_address_says_which_protocol_is_spoken(endpoint, http):
    assert is_http(endpoint) is http


@pytest.mark.parametrize(
    "endpoint", ["", "http://", "grpc://localhost:4317", "http://a:b", "collector at home", "://x"]
)
def test_what_is_no_address_is_refused(endpoint):
    with pytest.raises(ConfigurationError, match="--otlp-endpoint"):
        is_http(endpoint)


def record(sampling: SamplingParams, *, handler="generate", seeds=(None,)) -> RequestRecord:
    made = RequestRecord(handler=handler, method="POST", route="/generate", request_id="r", model="m")
    generation = GenerationRecord(arrived=made.arrived, stream=True, validated=made.arrived, sampling=sampling)
    generation.seeds = list(seeds)
    generation.max_new_tokens = 9
    generation.begin(0, FirstToken(arrived=made.arrived, begun=made.arrived + 1, reached=made.arrived + 2))
    made.generations.append(generation)
    made.status = 200
    made.close()
    return made


def test_a_clients_text_is_in_no_attribute():
    sampling = SamplingParams(
        do_sample=True, top_k=5, grammar=Grammar(GrammarKind.REGEX, "canary"), logit_bias={1: 2.0}, seed=3
    )
    attributes = request_attributes(record(sampling, seeds=(3,)))
    assert "canary" not in repr(attributes)
    assert json.loads(attributes["parameters"]) == {"do_sample": True, "top_k": 5, "seed": 3, "max_new_tokens": 9}


def test_a_greedy_request_has_no_temperature_and_no_seed():
    attributes = request_attributes(record(SamplingParams(temperature=0.7)))
    assert attributes["gen_ai.request.temperature"] == 0.0
    assert "seed" not in attributes
    assert "gen_ai.request.seed" not in attributes


def test_a_seed_beyond_63_bits_stays_exact():
    attributes = request_attributes(record(SamplingParams(do_sample=True, seed=2**64 - 1), seeds=(2**64 - 1,)))
    assert attributes["seed"] == "18446744073709551615"
    assert "gen_ai.request.seed" not in attributes


@pytest.mark.parametrize(
    ("handler", "operation"),
    [("generate", "text_completion"), ("completions", "text_completion"), ("chat_completions", "chat")],
)
def test_the_operation_is_named_as_opentelemetry_does(handler, operation):
    attributes = request_attributes(record(SamplingParams(), handler=handler))
    assert attributes["gen_ai.operation.name"] == operation
    assert attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(2.0)


def test_a_request_without_a_generation_has_the_names_of_http_alone():
    made = RequestRecord(handler="tokenize", method="POST", route="/tokenize", request_id="r", model="m")
    made.status = 200
    made.close()
    attributes = request_attributes(made)
    assert attributes.keys() == {
        "http.request.method",
        "http.route",
        "http.response.status_code",
        "request_id",
        "total_time",
    }
