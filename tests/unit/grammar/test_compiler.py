"""Which texts grammars allow, and how a matcher follows one."""

import pytest

from serving.errors import ModelError, ValidationError
from serving.grammar.compiler import MAX_SOURCE_CHARACTERS, GrammarCompiler, Matcher
from serving.protocol import Grammar, GrammarKind

EOS = 0
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
}
TREE = {
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "$ref": "#/$defs/tree",
}


@pytest.mark.parametrize(
    ("value", "text", "allowed"),
    [
        (PERSON, '{"name":"Ann","age":7}', True),
        (PERSON, '{"name": "Ann", "age": 7}', True),
        (PERSON, '{"age":7,"name":"Ann"}', False),  # the schema's order
        (PERSON, '{"name":"Ann","age":151}', False),
        (PERSON, '{"name":"Ann"}', False),
        (PERSON, '{"name":"Ann","age":7,"more":1}', False),  # what is not declared
        ({**PERSON, "additionalProperties": True}, '{"name":"Ann","age":7,"more":1}', True),
        ({**PERSON, "required": ["name"]}, '{"name":"Ann"}', True),
        ({"type": "object"}, '{"any":[1,null,{"thing":true}]}', True),
        ({"type": "object"}, "[]", False),
        ({"type": "array", "items": {"type": "number"}, "minItems": 2}, "[1,2.5]", True),
        ({"type": "array", "items": {"type": "number"}, "minItems": 2}, "[1]", False),
        ({"enum": ["a", 1, None]}, "null", True),
        ({"enum": ["a", 1, None]}, '"b"', False),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", True),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, '"x"', True),
        ({"type": "string", "pattern": "^a+$"}, '"aa"', True),
        ({"type": "string", "pattern": "^a+$"}, '"ab"', False),
        ({"type": "string", "format": "date"}, '"2026-11-21"', True),
        ({"type": "string", "format": "date"}, '"2026-13-21"', False),
        (TREE, "[[],[[]]]", True),
        (TREE, "[1]", False),
        (True, '"anything"', True),
        (
            {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]},
            '{"a":1,"b":2}',
            True,
        ),
    ],
)
def test_json_is_held_to_its_schema(takes, schema, value, text, allowed):
    assert takes(schema(value), text) is allowed


@pytest.mark.parametrize("text", ['{ "name":"Ann","age":7}', '{"name":  "Ann","age":7}', '{"name":\n"Ann","age":7}'])
def test_no_blanks_can_be_written_without_end(takes, schema, text):
    assert not takes(schema(PERSON), text)


def test_a_schema_cannot_choose_the_compilers_options(takes, schema):
    flexible = {**PERSON, "x-guidance": {"whitespace_flexible": True, "lenient": True}}

    assert not takes(schema(flexible), '{"name":     "Ann","age":7}')


@pytest.mark.parametrize(
    ("source", "text", "allowed"),
    [
        (r"\d{3}-\d{4}", "555-1234", True),
        (r"\d{3}-\d{4}", "555-12345", False),
        ("^yes$|^no$", "no", True),
        ("yes|no", "maybe", False),
        ("[äöü]+", "öö", True),
        ("", "", True),
        ("(a{1,1000}){1,1000}", "aaa", True),
    ],
)
def test_a_regular_expression_matches_from_end_to_end(takes, regex, source, text, allowed):
    assert takes(regex(source), text) is allowed


def test_a_lark_grammar_is_followed(takes):
    grammar = Grammar(GrammarKind.LARK, 'start: "call " %json {"type": "boolean"}')

    assert takes(grammar, "call true")
    assert not takes(grammar, "call 1")


@pytest.mark.parametrize(
    ("kind", "source", "fault"),
    [
        (GrammarKind.REGEX, "([", "grammar is not valid: unclosed character class"),
        (
            GrammarKind.REGEX,
            "(?=a)b",
            "grammar is not valid: look-around, including look-ahead and look-behind, is not",
        ),
        (GrammarKind.REGEX, r"(a)\1", "grammar is not valid: backreferences are not supported"),
        (GrammarKind.REGEX, r"[^\s\S]", "grammar is not valid: it allows no text"),
        (GrammarKind.REGEX, "a" * (MAX_SOURCE_CHARACTERS + 1), "grammar is not valid: it must have at most 262144"),
        (GrammarKind.LARK, "start: unknown", "grammar is not valid: "),
        (GrammarKind.JSON_SCHEMA, "{", "grammar is not valid: Expecting property name"),
        (GrammarKind.JSON_SCHEMA, "[]", "grammar is not supported"),
        (GrammarKind.JSON_SCHEMA, "5", "grammar is not supported"),
        (GrammarKind.JSON_SCHEMA, "false", "grammar is not valid: the schema `false` allows no text"),
        (GrammarKind.JSON_SCHEMA, '{"type": "foo"}', "grammar is not valid: Invalid type: foo"),
        (GrammarKind.JSON_SCHEMA, '{"not": {}}', 'grammar is not valid: Unimplemented keys: ["not"]'),
        (GrammarKind.JSON_SCHEMA, '{"type": "string", "enum": [1]}', "grammar is not valid: Unsatisfiable schema"),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "#"}', "grammar is not valid: it allows no text"),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:9/"}', "grammar is not valid: Resource"),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "file:///etc/passwd"}', "grammar is not valid: Resource"),
        (GrammarKind.JSON_SCHEMA, "[" * 200_000, "grammar is not valid: it is nested too deeply"),
        (GrammarKind.JSON_SCHEMA, '{"items":' * 101 + "{}" + "}" * 101, "grammar is not valid: it is nested more than"),
    ],
)
def test_a_wrong_grammar_says_in_one_line_what_is_wrong(compiler, kind, source, fault):
    with pytest.raises(ValidationError) as refused:
        compiler.compile(Grammar(kind, source))

    assert refused.value.detail.startswith(fault)
    assert "\n" not in refused.value.detail
    assert len(refused.value.detail) < 400


def bits(matcher: Matcher) -> set[int]:
    mask = int.from_bytes(matcher.allowed(), "little")
    return {token_id for token_id in range(mask.bit_length()) if mask >> token_id & 1}


def test_an_end_is_allowed_where_the_text_may_end_and_forced_where_it_must(tokenizer, compiler, regex):
    [a, b] = tokenizer.encode("ab")
    matcher = compiler.compile(regex("a+b"))

    assert bits(matcher) == {a}
    matcher.advance([a])
    assert bits(matcher) == {a, b}
    assert not matcher.accepts
    matcher.advance([b])
    assert bits(matcher) == {EOS}
    assert matcher.finished
    matcher.advance([EOS])
    assert matcher.error is None


def test_every_end_token_may_end_a_text(tokenizer, regex):
    compiler = GrammarCompiler(tokenizer.to_json(), vocab_size=258, eos_token_ids=[0, 1, 999])
    matcher = compiler.compile(regex("a"))
    matcher.advance(tokenizer.encode("a"))

    assert bits(matcher) == {0, 1}


def test_a_forbidden_token_is_an_error_that_stays(tokenizer, compiler, regex):
    matcher = compiler.compile(regex("a"))
    matcher.advance(tokenizer.encode("b"))

    assert matcher.error is not None
    assert "\n" not in matcher.error
    matcher.advance(tokenizer.encode("a"))
    assert matcher.error is not None
    assert not matcher.finished


def test_forks_go_their_own_ways(tokenizer, compiler, regex):
    first = compiler.compile(regex("ab|cd"))
    second = first.fork()
    first.advance(tokenizer.encode("a"))
    second.advance(tokenizer.encode("c"))

    assert bits(first) == set(tokenizer.encode("b"))
    assert bits(second) == set(tokenizer.encode("d"))


def test_a_grammar_is_compiled_once_until_it_is_forgotten(compiler, regex):
    grammar = regex("once")
    begun = compiler.begin(grammar)

    assert compiler.begin(regex("once")) is begun
    assert isinstance(begun.result(5), Matcher)
    compiler.forget(grammar)
    assert compiler.begin(grammar) is not begun


def test_only_the_latest_grammars_are_remembered(tokenizer, regex):
    compiler = GrammarCompiler(tokenizer.to_json(), vocab_size=258, eos_token_ids=[EOS], remembered=2)
    first, second = compiler.begin(regex("1")), compiler.begin(regex("2"))

    assert compiler.begin(regex("1")) is first
    compiler.begin(regex("3"))
    assert compiler.begin(regex("1")) is first
    assert compiler.begin(regex("2")) is not second


def test_a_refusal_is_told_to_whoever_waits_for_the_grammar(compiler, regex):
    with pytest.raises(ValidationError, match="unclosed character class"):
        compiler.begin(regex("([")).result(5)


@pytest.mark.parametrize("text", ["{}", "no JSON"])
def test_a_tokenizer_that_cannot_be_used_is_a_models_error(text):
    with pytest.raises(ModelError, match="grammars cannot be followed with this tokenizer"):
        GrammarCompiler(text, vocab_size=258, eos_token_ids=[EOS])


def test_a_model_without_an_end_token_has_no_grammars(tokenizer):
    with pytest.raises(ModelError, match="end-of-sequence"):
        GrammarCompiler(tokenizer.to_json(), vocab_size=258, eos_token_ids=[300])


def test_a_model_with_fewer_rows_than_tokens_has_grammars(tokenizer, regex):
    compiler = GrammarCompiler(tokenizer.to_json(), vocab_size=200, eos_token_ids=[EOS])

    assert bits(compiler.compile(regex("a"))) == set(tokenizer.encode("a"))
