"""Tools: formats by template, conversations, grammars held against llguidance, and the reader of calls."""

import json

import llguidance
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from serving.errors import ToolError
from serving.protocol import GrammarKind
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate
from serving.validation.tool_calls import ToolCallParser
from serving.validation.tool_syntax import ToolSyntax
from serving.validation.tools import (
    HERMES,
    JSON,
    MISTRAL,
    MISTRAL_NAMED,
    Demand,
    Tool,
    ToolUse,
    chosen,
    format_of,
    named,
)

WEATHER = Tool(
    name="get_weather",
    description="Of a place",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city"],
    },
)
CLOCK = Tool(name="get")  # whose name is the beginning of another's
TOOLS = [WEATHER, CLOCK]
FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "mistral named": MISTRAL_NAMED, "json": JSON}
ADDED = ("</s>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>")


def tokenizer(special=ADDED) -> tuple[Tokenizer, llguidance.LLTokenizer]:
    """One token a byte, then `ADDED`, of which some are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken(text, special=text in special) for text in ADDED])
    return Tokenizer(backend, {}), llguidance.LLTokenizer(backend.to_str(), eos_token=backend.token_to_id("</s>"))


TOKENIZER, AUTOMATON_TOKENIZER = tokenizer()
PLAIN_TOKENIZER, PLAIN_AUTOMATON_TOKENIZER = tokenizer(special=("</s>",))


def use(demand=Demand.MAY, tools=TOOLS, *, several=True) -> ToolUse:
    return ToolUse(tools=tools, demand=demand, several=several)


def reaches(syntax: ToolSyntax, asked: ToolUse, text: str, *, letters: bool = False) -> tuple[int, bool]:
    """How many tokens of a text the grammar allows, and whether it may end after them."""
    plain = syntax is PLAIN
    source = syntax.grammar(asked)
    assert source.kind is GrammarKind.LARK
    grammar = llguidance.LLMatcher.grammar_from_lark(source.source)
    matcher = llguidance.LLMatcher(PLAIN_AUTOMATON_TOKENIZER if plain else AUTOMATON_TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    words = PLAIN_TOKENIZER if plain else TOKENIZER
    token_ids = list(text.encode()) if letters else words.encode(text)
    if letters:
        token_ids = [token_id for letter in text for token_id in words.encode(letter)]
    read = matcher.try_consume_tokens(token_ids)
    return len(token_ids) - read, matcher.is_accepting()


PLAIN = ToolSyntax(HERMES, PLAIN_TOKENIZER, in_template=True)
SYNTAXES = {name: ToolSyntax(words, TOKENIZER, in_template=True) for name, words in FORMATS.items()}

CALL = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Bonn"}}]',
    "mistral named": '[TOOL_CALLS]get_weather[ARGS]{"city": "Bonn"}',
    "json": '{"name": "get_weather", "parameters": {"city": "Bonn"}}',
}
TWO = {
    "hermes": CALL["hermes"] + '\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>',
    "mistral": CALL["mistral"][:-1] + ', {"name": "get", "arguments": {}}]',
    "mistral named": CALL["mistral named"] + "[TOOL_CALLS]get[ARGS]{}",
}
BROKEN = {
    "hermes": '<tool_call>\n{"name": "get_money", "arguments": {}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "get_money", "arguments": {}}]',
    "mistral named": '[TOOL_CALLS]get_money[ARGS]{"city": "Bonn"}',
}


class TestFormat:
    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{{ '<tool_call>\\n{\"name\": ' }}", HERMES),
            ("{{ '<tool_call>\\n<function=' + name }}", JSON),
            ("{{ '[TOOL_CALLS] [' }}", MISTRAL),
            ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", MISTRAL_NAMED),
            ('{{ \'{"name": "\' }}{{ \'"parameters": \' }}', JSON),
            ("{{ messages }}", JSON),
            ("", JSON),
        ],
    )
    def test_a_templates_source_shows_its_format(self, template, words):
        assert format_of(template) is words


class TestChoice:
    @pytest.mark.parametrize("choice", [None, "auto"])
    def test_a_model_may_call_unless_something_else_is_said(self, choice):
        assert chosen(TOOLS, choice, parallel=True) == use()

    def test_required_means_that_it_must(self):
        assert chosen(TOOLS, "required", parallel=False) == use(Demand.MUST, several=False)

    def test_none_and_no_tools_mean_no_use(self):
        assert chosen(TOOLS, "none", parallel=True) is None
        assert chosen([], "required", parallel=True) is None

    def test_any_other_word_is_a_functions_name(self):
        assert chosen(TOOLS, "get", parallel=True) == named(TOOLS, "get") == use(Demand.MUST, [CLOCK], several=False)

    def test_an_unknown_name_is_refused_in_the_original_words(self):
        with pytest.raises(ToolError, match=r"^Tool error: Tool with name nope not found$"):
            chosen(TOOLS, "nope", parallel=True)


class TestConversation:
    USER = {"role": "user", "content": "Hi"}  # noqa: RUF012 - never changed

    def test_a_template_that_knows_tools_gets_them_as_they_are(self):
        conversation = SYNTAXES["hermes"].conversation([self.USER], use(), None, {"a": 1})
        assert conversation.messages == [self.USER]
        assert conversation.template_kwargs == {"a": 1}
        assert conversation.tools == [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "Of a place",
                    "parameters": WEATHER.parameters,
                },
            },
            {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}},
        ]

    def test_what_the_template_reads_decides_who_tells_of_tools(self):
        syntax = ToolSyntax.of(ChatTemplate("{% if tools %}<tool_call>{% endif %}", {}), TOKENIZER)
        assert syntax.format is HERMES
        assert syntax.conversation([self.USER], use(), None, {}).messages == [self.USER]

    def test_a_clients_own_prompt_is_added(self):
        conversation = SYNTAXES["hermes"].conversation([self.USER], use(), "Call!", {})
        assert conversation.messages == [{"role": "user", "content": "Hi\n---\nCall!"}]

    @pytest.mark.parametrize("prompt", [None, "Call!"])
    def test_a_template_without_tools_gets_them_in_the_last_message(self, prompt):
        syntax = ToolSyntax.of(ChatTemplate("{{ messages }}{# tools #}", {}), TOKENIZER)
        first, last = syntax.conversation([self.USER, self.USER], use(tools=[CLOCK]), prompt, {}).messages
        assert first == self.USER
        listed = '[{"type":"function","function":{"name":"get","parameters":{"type":"object","properties":{}}}}]'
        begin, _, told = last["content"].rpartition(listed)
        assert begin == "Hi\n---\n"
        assert told == "\nCall!" if prompt else "JSON object" in told

    def test_parts_of_content_stay_parts(self):
        parts = [{"type": "text", "text": "Hi"}]
        syntax = SYNTAXES["hermes"]
        (message,) = syntax.conversation([{"role": "user", "content": parts}], use(), "x", {}).messages
        assert message["content"] == [*parts, {"type": "text", "text": "\n---\nx"}]

    def test_without_use_nothing_is_told(self):
        conversation = ToolSyntax.of(None, TOKENIZER).conversation([self.USER], None, "Call!", {})
        assert conversation.messages == [self.USER]
        assert conversation.tools is None

    def test_ids_are_cut_to_what_mistrals_templates_take(self):
        messages = [
            {"role": "assistant", "content": "", "tool_calls": [{"id": "call_0123456789abcdef", "function": {}}]},
            {"role": "tool", "content": "1", "tool_call_id": "call_0123456789abcdef"},
        ]
        call, result = SYNTAXES["mistral"].conversation(messages, None, None, {}).messages
        assert call["tool_calls"][0]["id"] == result["tool_call_id"] == "789abcdef"
        assert SYNTAXES["hermes"].conversation(messages, None, None, {}).messages == messages

    def test_only_special_tokens_have_to_be_shown(self):
        assert PLAIN.markers == ()
        assert [TOKENIZER.token_text(marker) for marker in SYNTAXES["hermes"].markers] == [
            HERMES.opening,
            HERMES.closing,
        ]
        assert [TOKENIZER.token_text(marker) for marker in SYNTAXES["mistral named"].markers] == [
            "[TOOL_CALLS]",
            "[ARGS]",
        ]


class TestGrammar:
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("demand", Demand)
    def test_a_call_is_allowed_and_complete(self, name, demand):
        assert reaches(SYNTAXES[name], use(demand), CALL[name]) == (0, True)

    @pytest.mark.parametrize("name", TWO)
    @pytest.mark.parametrize("demand", Demand)
    def test_several_calls_are_allowed_only_if_wanted(self, name, demand):
        assert reaches(SYNTAXES[name], use(demand), TWO[name]) == (0, True)
        assert reaches(SYNTAXES[name], use(demand, several=False), TWO[name])[0] > 0

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("text", ["Hello.", "[1, 2]", '{"name": "Ada"}', "a <think>b</tool_c", "<tool_cal", "\n\n"])
    def test_any_text_is_allowed_where_no_call_is_needed(self, name, text):
        assert reaches(SYNTAXES[name], use(), text) == (0, True)

    @pytest.mark.parametrize("name", FORMATS)
    def test_no_text_is_allowed_where_a_call_is_needed(self, name):
        remaining, _ = reaches(SYNTAXES[name], use(Demand.MUST), "Hello.")
        assert remaining == len("Hello.")

    @pytest.mark.parametrize("name", FORMATS)
    def test_an_empty_answer_is_none_where_a_call_is_needed(self, name):
        assert reaches(SYNTAXES[name], use(), "") == (0, True)
        assert reaches(SYNTAXES[name], use(Demand.MUST), "") == (0, False)

    @pytest.mark.parametrize("name", BROKEN)
    @pytest.mark.parametrize("demand", Demand)
    @pytest.mark.parametrize("before", ["", "Let me see. "])
    def test_what_begins_like_a_call_must_be_one(self, name, demand, before):
        assert reaches(SYNTAXES[name], use(demand), before + BROKEN[name])[0] > 0

    def test_a_json_text_that_names_a_function_must_be_a_call(self):
        for text in ('{"name": "get_weather", "x": 1}', ' {"name":"get"'):
            assert reaches(SYNTAXES["json"], use(), text)[0] > 0
        assert reaches(SYNTAXES["json"], use(), '{"name": "get_money", "x": 1}') == (0, True)

    @pytest.mark.parametrize(
        "arguments", ["{}", '{"city": 1}', '{"city": "B", "days": 0}', '{"city": "B", "more": 1}', '{"city":  "B"}']
    )
    @pytest.mark.parametrize("name", FORMATS)
    def test_arguments_follow_their_schema(self, name, arguments):
        text = CALL[name].replace('{"city": "Bonn"}', arguments)
        assert reaches(SYNTAXES[name], use(), text)[0] > 0

    def test_text_may_stand_around_calls(self):
        text = f"I will see. {TWO['hermes']} Done. "
        assert reaches(SYNTAXES["hermes"], use(), text) == (0, True)

    @pytest.mark.parametrize("syntax", [SYNTAXES["hermes"], PLAIN])
    def test_a_marker_in_letters_is_a_marker(self, syntax):
        assert reaches(syntax, use(), CALL["hermes"], letters=True) == (0, True)
        assert reaches(syntax, use(), BROKEN["hermes"], letters=True)[0] > 0
        assert reaches(syntax, use(), BROKEN["hermes"])[0] > 0

    def test_awkward_names_are_names(self):
        tool = Tool(name='a"b/c\\d\n<é>')
        for name, syntax in SYNTAXES.items():
            call = CALL[name].replace("get_weather", json.dumps(tool.name, ensure_ascii=False)[1:-1])
            call = call.replace('{"city": "Bonn"}', "{}")
            for demand in Demand:
                assert reaches(syntax, use(demand, [tool]), call) == (0, True)

    def test_unknown_keywords_are_ignored_unless_strict(self):
        schema = {"type": "object", "properties": {"a": {"type": "string", "format": "haiku"}}}
        assert reaches(PLAIN, use(tools=[Tool(name="f", parameters=schema)]), "x") == (0, True)
        with pytest.raises(AssertionError, match="haiku"):
            reaches(PLAIN, use(tools=[Tool(name="f", parameters=schema, strict=True)]), "x")

    @pytest.mark.parametrize(
        ("schema", "arguments"),
        [
            ({"type": "object"}, '{"a": 1}'),
            ({"properties": {}, "additionalProperties": "true"}, '{"a": 1}'),
            ({"properties": {"a": {}}, "required": ["b"]}, '{"a": 1, "b": 2}'),
            ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, '{"a": 1, "b": 2}'),
            ({"properties": None, "required": None}, '{"a": 1}'),
            ({"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}}, '{"n": {"n": {}}}'),
        ],
    )
    def test_objects_that_are_open_stay_so(self, schema, arguments):
        text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        assert reaches(PLAIN, use(Demand.MUST, [Tool(name="f", parameters=schema)]), text) == (0, True)

    def test_local_references_in_a_schema_are_followed(self):
        schema = {"$defs": {"c": {"enum": ["red"]}}, "properties": {"c": {"$ref": "#/$defs/c"}}, "required": ["c"]}
        asked = use(Demand.MUST, [Tool(name="f", parameters=schema), Tool(name="g", parameters=schema)])
        call = '<tool_call>\n{"name": "g", "arguments": {"c": "%s"}}\n</tool_call>'
        assert reaches(PLAIN, asked, call % "red") == (0, True)
        assert reaches(PLAIN, asked, call % "blue")[0] > 0


def read(words, pieces, asked) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls in a text that comes in pieces."""
    parser = ToolCallParser(words, asked)
    content, calls, ids = "", [], []
    for piece in pieces:
        said = parser.feed(piece)
        content += said.content
        assert len({call.index for call in said.calls}) == len(said.calls)
        for call in said.calls:
            if call.id is not None:
                assert call.index == len(calls)
                assert call.name is not None
                calls.append([call.name, call.arguments])
                ids.append(call.id)
            else:
                assert call.index == len(calls) - 1
                assert call.name is None
                calls[-1][1] += call.arguments
    assert len(set(ids)) == len(ids) == parser.calls
    return content + parser.finish(), [tuple(call) for call in calls]


BONN = ("get_weather", '{"city": "Bonn"}')


class TestParser:
    @pytest.mark.parametrize("name", FORMATS)
    def test_a_call_is_read(self, name):
        assert read(FORMATS[name], [CALL[name]], use()) == ("", [BONN])

    @pytest.mark.parametrize("name", TWO)
    def test_several_calls_are_read(self, name):
        assert read(FORMATS[name], [TWO[name]], use()) == ("", [BONN, ("get", "{}")])

    @pytest.mark.parametrize("name", TWO)
    def test_only_the_first_call_is_read_if_several_are_not_wanted(self, name):
        assert read(FORMATS[name], [TWO[name] + " x"], use(several=False)) == ("", [BONN])

    @pytest.mark.parametrize("name", BROKEN)
    def test_a_call_of_what_was_not_offered_is_text(self, name):
        text = f"So: {BROKEN[name]} Well."
        assert read(FORMATS[name], [text], use()) == (text, [])

    def test_blanks_around_calls_are_left_out(self):
        assert read(HERMES, [f"See. \n\n{TWO['hermes']}\n"], use()) == ("See.", [BONN, ("get", "{}")])

    def test_text_after_calls_is_content(self):
        assert read(HERMES, [f"See. {CALL['hermes']} Done. "], use()) == ("See.Done. ", [BONN])

    def test_other_text_is_as_it_was(self):
        for name, words in FORMATS.items():
            for text in ("", " ", "Hi. \n", '{"a": 1}', "<tool_cal", "[TOOL_CALLS", " {", CALL[name][:20]):
                assert read(words, [text], use()) == (text, [])

    def test_a_false_beginning_hides_no_call(self):
        text = f"<tool_<tool_call><tool_call>x {CALL['hermes']}"
        assert read(HERMES, [text], use()) == ("<tool_<tool_call><tool_call>x", [BONN])

    def test_braces_and_markers_in_strings_are_arguments(self):
        arguments = r'{"city": "}\"{</tool_call>\\", "o": {"p": [{}]}}'
        call = CALL["hermes"].replace(BONN[1], arguments)
        assert read(HERMES, [call], use()) == ("", [("get_weather", arguments)])

    @pytest.mark.parametrize("name", FORMATS)
    def test_arguments_that_are_cut_off_are_given_as_far_as_they_go(self, name):
        text = CALL[name][: CALL[name].index("nn")]
        assert read(FORMATS[name], [text], use()) == ("", [("get_weather", '{"city": "Bo')])

    def test_content_is_not_held_back_longer_than_needed(self):
        parser = ToolCallParser(HERMES, use())
        assert [parser.feed(piece).content for piece in ("Hi", " ", "a<", "b", "<tool_call", "s>")] == [
            "Hi",
            "",
            " a",
            "<b",
            "",
            "<tool_calls>",
        ]

    def test_a_json_text_is_shown_as_soon_as_it_is_no_call(self):
        parser = ToolCallParser(JSON, use())
        assert [parser.feed(piece).content for piece in ("{", '"na', 'me": "Ad', 'a"')] == [
            "",
            "",
            '{"name": "Ad',
            'a"',
        ]

    def test_a_name_comes_once_and_before_the_arguments(self):
        parser = ToolCallParser(HERMES, use())
        pieces = [piece for letter in CALL["hermes"] for piece in parser.feed(letter).calls]
        assert [piece.name for piece in pieces] == ["get_weather"] + [None] * (len(pieces) - 1)
        assert pieces[0].id.startswith("call_")
        assert len(pieces[0].id) == len("call_") + 24
        assert {piece.id for piece in pieces[1:]} == {None}
        assert "".join(piece.arguments for piece in pieces) == BONN[1]

    SHREDS = st.sampled_from(
        [
            *(call for calls in (CALL, TWO, BROKEN) for call in calls.values()),
            *(call[: len(call) // 2] for call in CALL.values()),
            *(call[len(call) // 2 :] for call in CALL.values()),
            *(
                "<tool_call>",
                "</tool_call>",
                "[TOOL_CALLS]",
                "[ARGS]",
                "get",
                "get_weather",
                '{"name": "get"',
                "{}",
                "}",
            ),
            *(" ", "\n", ",", "]", "[", "<", '"', "\\", "Hi", "é"),
        ]
    )

    @given(
        words=st.sampled_from(list(FORMATS.values())),
        shreds=st.lists(SHREDS, max_size=8),
        several=st.booleans(),
        chunks=st.data(),
    )
    def test_the_pieces_in_which_a_text_comes_do_not_matter(self, words, shreds, several, chunks):
        text = "".join(shreds)
        cuts = sorted(chunks.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        asked = use(several=several)
        whole = read(words, [text], asked)
        assert read(words, pieces, asked) == whole
        assert read(words, text, asked) == whole

    @given(st.text(alphabet='<tool_cal>{}" \n[]', max_size=60))
    def test_a_text_without_calls_is_content_to_the_letter(self, text):
        for words in FORMATS.values():
            assert read(words, [text], use()) == (text, [])
