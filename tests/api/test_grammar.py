"""How a body says what the text has to be, and the words for a grammar that is none."""

import json

import gevent
import pytest

from serving.protocol import GrammarKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HOSTILE = {"type": "integer", "multipleOf": 999_983}
UNTYPED = "Failed to deserialize the JSON body into the target type: "


@pytest.fixture(scope="module")
def grammatical(serve_module):
    return serve_module(grammars=True)


@pytest.fixture
def generate(grammatical):
    def post(grammar, path="/generate", **parameters):
        body = {"inputs": "say:{}", "parameters": {"max_new_tokens": 4, "grammar": grammar, **parameters}}
        return grammatical.client.post(path, json=body)

    return post


@pytest.fixture
def chat(grammatical):
    def post(response_format, **fields):
        messages = [{"role": "user", "content": "say:{}"}]
        body = {"messages": messages, "max_tokens": 4, "response_format": response_format, **fields}
        return grammatical.client.post("/v1/chat/completions", json=body)

    return post


@pytest.fixture
def complete(grammatical):
    def post(response_format, **fields):
        body = {"prompt": "say:{}", "max_tokens": 4, "response_format": response_format, **fields}
        return grammatical.client.post("/v1/completions", json=body)

    return post


@pytest.fixture
def told(grammatical, monkeypatch):
    """The grammars that reach the device."""
    grammars = []
    submit = grammatical.runner.submit

    def recording(plan):
        grammars.extend(new.sampling.grammar for new in plan.started)
        submit(plan)

    monkeypatch.setattr(grammatical.runner, "submit", recording)
    return grammars


NATIVE = [
    ({"type": "json", "value": SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"type": "json_object", "value": SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"type": "json", "value": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"type": "json_schema", "value": {"name": "it", "schema": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"type": "json_schema", "value": {"schema": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA),
    ({"type": "json", "value": True}, GrammarKind.JSON_SCHEMA, True),
    ({"type": "regex", "value": "a+"}, GrammarKind.REGEX, "a+"),
]
OPENAI = [
    *NATIVE,
    ({"type": "json_object"}, GrammarKind.JSON_SCHEMA, {"type": "object"}),
    ({"type": "json_object", "value": None}, GrammarKind.JSON_SCHEMA, {"type": "object"}),
    (
        {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}},
        GrammarKind.JSON_SCHEMA,
        SCHEMA,
    ),
    (
        {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": None, "description": "x"}},
        GrammarKind.JSON_SCHEMA,
        SCHEMA,
    ),
    ({"type": "json_schema", "json_schema": {"name": "it"}}, GrammarKind.JSON_SCHEMA, {"type": "object"}),
]


def told_as(grammar):
    return grammar.kind, grammar.source if grammar.kind is GrammarKind.REGEX else json.loads(grammar.source)


@pytest.mark.parametrize("path", ["/generate", "/", "/generate_stream"])
@pytest.mark.parametrize(("grammar", "kind", "source"), NATIVE)
def test_tgis_shapes_reach_the_device(generate, told, path, grammar, kind, source):
    response = generate(grammar, path)

    assert response.status_code == 200
    response.get_data()
    assert [told_as(one) for one in told] == [(kind, source)]


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize(("response_format", "kind", "source"), OPENAI)
def test_openais_shapes_reach_the_device(request, told, route, response_format, kind, source):
    response = request.getfixturevalue(route)(response_format)

    assert response.status_code == 200
    assert [told_as(one) for one in told] == [(kind, source)]


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
def test_text_is_no_grammar(request, told, route, response_format):
    assert request.getfixturevalue(route)(response_format).status_code == 200
    assert told == [None]


def test_a_schemas_order_is_kept(grammatical, told):
    members = {name: {"type": "integer"} for name in ("z", "a", "m")}
    grammar = {"type": "json", "value": {"properties": members}}
    body = json.dumps({"inputs": "say:{}", "parameters": {"max_new_tokens": 4, "grammar": grammar}})
    grammatical.client.post("/generate", data=body, content_type="application/json")  # `json=` would sort

    assert list(json.loads(told[0].source)["properties"]) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("grammar", "place"),
    [
        ({}, "parameters.grammar"),
        ("a+", "parameters.grammar"),
        ([], "parameters.grammar"),
        ({"type": "yaml", "value": {}}, "parameters.grammar"),
        ({"type": "text"}, "parameters.grammar"),
        ({"type": "json"}, "missing field `value`"),
        ({"type": "json_object"}, "missing field `value`"),
        ({"type": "regex", "value": 5}, "value"),
        ({"type": "regex", "value": None}, "value"),
        ({"type": "json_schema", "value": "x"}, "value"),
        ({"type": "json_schema", "value": {"name": "x"}}, "missing field `schema`"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "missing field `value`"),
    ],
)
def test_other_shapes_are_the_frameworks_errors(generate, grammar, place):
    response = generate(grammar)

    assert response.status_code == 422
    assert response.content_type.startswith("text/plain")
    assert response.text.startswith(UNTYPED)
    assert place in response.text


@pytest.mark.parametrize(
    ("response_format", "place"),
    [
        ({}, "response_format"),
        ("json_object", "response_format"),
        ({"type": "xml"}, "response_format"),
        ({"type": "json_schema"}, "missing field `json_schema`"),
        ({"type": "json_schema", "json_schema": 5}, "json_schema"),
        ({"type": "regex"}, "missing field `value`"),
    ],
)
def test_so_they_are_on_openais_routes(chat, complete, response_format, place):
    for response in (chat(response_format), complete(response_format)):
        assert response.status_code == 422
        assert UNTYPED in response.text
        assert place in response.text


WRONG = [
    ({"type": "regex", "value": "(["}, "grammar is not valid: unclosed character class"),
    ({"type": "json", "value": {"type": "foo"}}, "grammar is not valid: Invalid type: foo"),
    ({"type": "json", "value": {"not": {}}}, 'grammar is not valid: Unimplemented keys: ["not"]'),
    ({"type": "json", "value": []}, "grammar is not supported"),
    ({"type": "json", "value": None}, "grammar is not supported"),
    ({"type": "json", "value": "{"}, "grammar is not valid: Expecting property name enclosed in double quotes: line"),
    ({"type": "json", "value": HOSTILE}, "grammar is not valid: it takes too long to compile"),
    ({"type": "regex", "value": "ab" * 200_000}, "grammar is not valid: it must have at most 262144 characters"),
]


@pytest.mark.parametrize(("grammar", "detail"), WRONG)
def test_a_wrong_grammar_is_a_validation_error(generate, grammar, detail):
    response = generate(grammar)

    assert response.status_code == 422
    assert response.json["error"].startswith(f"Input validation error: {detail}")
    assert response.json["error_type"] == "validation"


def test_so_it_is_in_openais_words(chat, complete):
    for response in (chat({"type": "regex", "value": "(["}), complete({"type": "regex", "value": "(["})):
        assert response.status_code == 422
        assert response.json["error"]["message"] == (
            "Input validation error: grammar is not valid: unclosed character class"
        )
        assert response.json["error_type"] == "validation"


def test_a_stream_of_a_wrong_grammar_is_one_error(generate, events):
    [event] = events(generate({"type": "regex", "value": "(["}, "/generate_stream"))

    assert event["error"] == "Input validation error: grammar is not valid: unclosed character class"


@pytest.mark.parametrize(
    ("parameters", "detail"),
    [
        ({"max_new_tokens": 10_000}, "`inputs` tokens + `max_new_tokens` must be <= "),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"stop": ["x"] * 50}, "`stop` supports up to "),
    ],
)
def test_every_other_rule_is_checked_before_the_grammar(generate, parameters, detail):
    response = generate({"type": "regex", "value": "(["}, **parameters)

    assert response.json["error"].startswith(f"Input validation error: {detail}")


def test_a_server_without_grammars_supports_none(serve):
    client = serve(grammars=False).client
    body = {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a"}}}

    assert client.post("/generate", json=body).json == {
        "error": "Input validation error: grammar is not supported",
        "error_type": "validation",
    }


def test_an_end_ends_under_a_grammar_even_if_it_was_to_be_ignored(grammatical, generate):
    response = generate({"type": "json", "value": SCHEMA}, ignore_eos=True, details=True, max_new_tokens=9)

    details = response.json["details"]
    assert details["finish_reason"] == "eos_token"
    assert [token["text"] for token in details["tokens"]] == ["{", "}", "</s>"]


@pytest.mark.parametrize(("route", "number"), [("generate", 999_953), ("chat", 999_959), ("complete", 999_961)])
def test_the_hub_goes_on_while_a_short_request_waits_for_its_grammar(request, route, number):
    """Each asks for another grammar: verdicts are remembered."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            gevent.sleep(0.002)
            ticks += 1

    ticking = gevent.spawn(tick)
    try:
        grammar = {"type": "json", "value": {"type": "integer", "multipleOf": number}}
        response = request.getfixturevalue(route)(grammar)
    finally:
        ticking.kill()

    assert response.status_code == 422
    assert ticks > 20
