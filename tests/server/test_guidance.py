"""Grammars on a real server with the demo model: what is written is what was asked for."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

pytestmark = pytest.mark.server

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
}
PHONE = r"\(\d{3}\) \d{3}-\d{4}"


@pytest.fixture
def demo(demo_server):
    return demo_server


def generate(server, grammar: dict | None, **parameters) -> dict:
    body = {
        "inputs": "Tell me about a cat.",
        "parameters": {"max_new_tokens": 120, "details": True, "grammar": grammar, **parameters},
    }
    response = server.post("/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("parameters", [{}, {"do_sample": True, "seed": 4, "temperature": 1.5, "top_p": 0.9}])
def test_json_is_valid_under_its_schema(demo, parameters):
    answer = generate(demo, {"type": "json", "value": PERSON}, **parameters)

    assert answer["details"]["finish_reason"] == "eos_token"
    jsonschema.validate(json.loads(answer["generated_text"]), PERSON)
    assert list(json.loads(answer["generated_text"]))[:2] == ["name", "age"]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_regular_expression_matches_the_whole_text(demo, ignore_eos):
    answer = generate(demo, {"type": "regex", "value": PHONE}, do_sample=True, seed=9, ignore_eos=ignore_eos)

    assert re.fullmatch(PHONE, answer["generated_text"])
    assert answer["details"]["finish_reason"] == "eos_token"


def test_a_text_that_is_cut_at_its_length_is_a_beginning(demo):
    whole = generate(demo, {"type": "json", "value": PERSON})["generated_text"]
    cut = generate(demo, {"type": "json", "value": PERSON}, max_new_tokens=4)

    assert cut["details"]["finish_reason"] == "length"
    assert whole.startswith(cut["generated_text"])
    assert cut["generated_text"] != whole


def test_a_stop_string_ends_a_text_before_its_grammar_does(demo):
    answer = generate(demo, {"type": "regex", "value": PHONE}, stop=[") "])

    assert re.fullmatch(r"\(\d{3}\) ", answer["generated_text"])
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_the_pieces_of_a_stream_are_the_text(demo):
    body = {"inputs": "A cat", "parameters": {"max_new_tokens": 120, "grammar": {"type": "json", "value": PERSON}}}
    found = events(demo.post("/generate_stream", body))
    text = "".join(event["token"]["text"] for event in found if not event["token"]["special"])

    assert text == found[-1]["generated_text"]
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
        {"type": "json_object", "value": PERSON},
    ],
)
def test_a_chat_streams_json(demo, response_format):
    body = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 120,
        "stream": True,
        "seed": 5,
        "response_format": response_format,
    }
    found = events(demo.post("/v1/chat/completions", body))

    text = "".join(event["choices"][0]["delta"]["content"] or "" for event in found)
    jsonschema.validate(json.loads(text), PERSON)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_eight_at_once_each_get_what_they_asked_for(demo):
    grammars = [
        {"type": "json", "value": PERSON},
        {"type": "regex", "value": PHONE},
        None,
        {"type": "json", "value": {"enum": ["one", "two", 3]}},
        {"type": "regex", "value": "(yes|no)!"},
        None,
        {"type": "json", "value": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}},
        {"type": "json", "value": {**PERSON, "required": ["name", "age", "tags"]}},
    ]
    seeds = range(len(grammars))

    def ask(seed: int) -> str:
        return generate(demo, grammars[seed], do_sample=True, seed=seed, max_new_tokens=150)["generated_text"]

    alone = [ask(seed) for seed in seeds]
    with ThreadPoolExecutor(len(grammars)) as pool:
        together = list(pool.map(ask, seeds))

    for texts in (alone, together):
        for grammar, text in zip(grammars, texts, strict=True):
            if grammar is not None and grammar["type"] == "json":
                jsonschema.validate(json.loads(text), grammar["value"])
            elif grammar is not None:
                assert re.fullmatch(grammar["value"], text)


def test_a_hostile_grammar_is_refused_and_nobody_waits_for_it(demo):
    body = {
        "inputs": "x",
        "parameters": {"grammar": {"type": "json", "value": {"type": "integer", "multipleOf": 999_983}}},
    }
    response = demo.post("/generate", body)

    assert response.status_code == 422
    assert response.json()["error"] == "Input validation error: grammar is not valid: it takes too long to compile"
    assert response.elapsed.total_seconds() < 1.0
    assert re.fullmatch(PHONE, generate(demo, {"type": "regex", "value": PHONE})["generated_text"])


def test_streams_survive_the_death_of_the_device_under_a_grammar(demo):
    """The grammar's state is not lost either: it follows from the text."""
    grammar = {"type": "regex", "value": "(ab|cd){150}"}
    body = {"inputs": "x", "parameters": {"max_new_tokens": 400, "grammar": grammar}}
    with demo.post("/generate_stream", body, stream=True) as response:
        lines = response.iter_lines()
        first = [next(lines) for _ in range(6)]
        device = next(process for process in demo.processes() if "serving.runner.process" in process.cmdline())
        device.kill()
        rest = list(lines)
    found = [json.loads(line.removeprefix(b"data: ")) for line in [*first, *rest] if line.startswith(b"data: ")]

    assert re.fullmatch(grammar["value"], found[-1]["generated_text"])
