"""Answers whose form is prescribed: grammars of native routes, formats of OpenAI's, and tools.

Knows no model: a form must hold whatever the model would rather say.
"""

import json
import re
import time
from typing import Any

from scripts.wire.suite import (
    TGI,
    WEIR,
    Ask,
    Inapplicable,
    Target,
    check,
    demand,
    events,
    json_of,
    keys,
    message_of,
    ok,
    same,
    status,
    table,
    typed,
)

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
OTHER_TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
SOON_S = 5.0  # a slow machine's compile and two tokens
CHAT_PATH = "/v1/chat/completions"
BOTH = "Tool error: Grammar and tools are mutually exclusive"


def _follows_schema(text: str) -> None:
    value = json.loads(text)
    same(set(value), {"name", "age"}, "keys of the generated object")
    demand(value["name"] in ("Ada", "Bo"), f"name is {value['name']!r}")
    typed(value["age"], int, "age")


def _grammar(grammar: dict[str, Any]) -> Ask:
    def ask(target: Target) -> None:
        body = {"inputs": "A person:", "parameters": {"max_new_tokens": 60, "grammar": grammar}}
        response = target.post("/generate", body)
        if response.status_code == 422 and "grammar is not supported" in response.text:
            raise Inapplicable("--disable-grammar-support")
        text = json_of(ok(response))["generated_text"]
        if grammar["type"] == "regex":
            demand(re.fullmatch(grammar["value"], text), f"{text!r} does not match")
        else:
            _follows_schema(text)
        last = events(ok(target.post("/generate_stream", body)))[-1]
        same(last["generated_text"], text, "the text of the stream")

    return ask


GRAMMARS = table(
    "guidance", "a_grammar_holds", "6.4", TGI,
    {
        "json": _grammar({"type": "json", "value": SCHEMA}),
        "json in a string": _grammar({"type": "json", "value": json.dumps(SCHEMA)}),
        "json_object": _grammar({"type": "json_object", "value": SCHEMA}),
        "json_schema": _grammar({"type": "json_schema", "value": {"name": "person", "schema": SCHEMA}}),
        "regex": _grammar({"type": "regex", "value": "(Ada|Bo) is [0-9]{2}"}),
    },
)  # fmt: skip


def _format(response_format: dict[str, Any]) -> Ask:
    def ask(target: Target) -> None:
        body = {"messages": MESSAGES, "max_tokens": 60, "response_format": response_format}
        text = json_of(ok(target.post(CHAT_PATH, body)))["choices"][0]["message"]["content"]
        _follows_schema(text)
        chunks = events(ok(target.post(CHAT_PATH, {**body, "stream": True})), done=True)
        _follows_schema("".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks))

    return ask


TGIS_FORMATS = table(
    "guidance", "a_format_holds", "2.5", TGI,
    {
        "json": _format({"type": "json", "value": SCHEMA}),
        "json_object": _format({"type": "json_object", "value": SCHEMA}),
        "json_schema": _format({"type": "json_schema", "value": {"name": "person", "schema": SCHEMA}}),
    },
)  # fmt: skip
OPENAIS_FORMATS = table(
    "guidance", "a_format_of_openais_holds", "9.4", WEIR,
    {"json_schema": _format({"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}})},
)  # fmt: skip


@check("9.4", WEIR)
def a_json_object_needs_no_schema(target: Target) -> None:
    body = {"messages": MESSAGES, "max_tokens": 300, "temperature": 0, "response_format": {"type": "json_object"}}
    choice = ok(target.post(CHAT_PATH, body)).json()["choices"][0]
    if choice["finish_reason"] == "length":
        raise Inapplicable("the model finds no end")
    typed(json.loads(choice["message"]["content"]), dict, "the answer")


@check("9.15", WEIR)
def bounds_of_numbers_hold(target: Target) -> None:
    for seed in range(5):
        parameters = {"max_new_tokens": 60, "grammar": {"type": "json", "value": SCHEMA}, "seed": seed}
        response = target.post("/generate", {"inputs": "A person:", "parameters": {**parameters, "do_sample": True}})
        age = json.loads(ok(response).json()["generated_text"])["age"]
        demand(1 <= age <= 99, f"age is {age}")


def _bad_grammar(grammar: object, *, holds_type: bool = True) -> Ask:
    def ask(target: Target) -> None:
        parameters = {"max_new_tokens": 4, "grammar": grammar}
        response = status(target.post("/generate", {"inputs": "a", "parameters": parameters}), 422)
        if holds_type:
            body = json_of(response)
            same(body["error_type"], "validation", "error_type")
            demand(body["error"].startswith("Input validation error: "), f"error is {body['error']!r}")

    return ask


BAD_GRAMMARS = table(
    "guidance", "a_bad_grammar_is_refused", "6.4", TGI,
    {
        "json that is none": _bad_grammar({"type": "json", "value": "{not json"}),
        "a schema of a wrong type": _bad_grammar({"type": "json", "value": {"type": "nonsense", "properties": {}}}),
        "no type": _bad_grammar({"value": {}}, holds_type=False),
        "an unknown type": _bad_grammar({"type": "poem", "value": "a"}, holds_type=False),
        "a list": _bad_grammar([1], holds_type=False),
    },
)  # fmt: skip
HOSTILE_GRAMMARS = table(
    "guidance", "a_hostile_grammar_is_refused", "9.15", WEIR,
    {
        "a broken regex": _bad_grammar({"type": "regex", "value": "(["}),
        "a reference to nothing": _bad_grammar(
            {"type": "json", "value": {"properties": {"a": {"$ref": "#/$defs/none"}}, "required": ["a"]}}
        ),
    },
)  # fmt: skip


@check("9.15", WEIR)
def a_grammar_that_explodes_is_answered_soon(target: Target) -> None:
    many = {f"p{index}": {"type": "string"} for index in range(200)}
    for grammar in (
        {"type": "regex", "value": "((a{1,1000}){1,1000}){1,1000}"},
        {"type": "regex", "value": "(.*a){60}.{0,9000}b"},
        {"type": "json", "value": {"type": "object", "properties": many, "required": []}},
    ):
        begun = time.monotonic()
        response = target.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2, "grammar": grammar}})
        demand(response.status_code in (200, 422), f"status {response.status_code}: {response.text[:100]}")
        keys(json_of(response), ["generated_text"] if response.ok else ["error", "error_type"], "answer")
        demand(time.monotonic() - begun < SOON_S, f"it took {time.monotonic() - begun:.1f} s")


# -- Tools


def _tools(target: Target, **asked: Any) -> dict[str, Any]:
    response = target.post(CHAT_PATH, {"messages": MESSAGES, "max_tokens": 100, "tools": [TOOL, OTHER_TOOL], **asked})
    return dict(json_of(ok(response)))


def _check_call(call: dict[str, Any], name: str) -> None:
    same(call["type"], "function", "type")
    typed(call["id"], str, "id")
    same(call["function"]["name"], name, "name")
    demand(json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome"), f"arguments of {call}")


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def _forced(choice: object, tools: list[dict[str, Any]]) -> Ask:
    def ask(target: Target) -> None:
        (made,) = _tools(target, tool_choice=choice, tools=tools)["choices"]
        same(made["message"]["role"], "assistant", "role")
        demand(made["message"].get("content") is None, f"content beside a call: {made['message'].get('content')!r}")
        _check_call(made["message"]["tool_calls"][0], "get_weather")

    return ask


FORCED = table(
    "guidance", "a_tool_is_called_when_it_must_be", "2.4", TGI,
    {
        "by an object": _forced(NAMED, [OTHER_TOOL, TOOL]),
        "by its name": _forced("get_weather", [OTHER_TOOL, TOOL]),
        "the only one": _forced("required", [TOOL]),
    },
)  # fmt: skip


@check("2.4")
def no_tool_is_called_when_none_may_be(target: Target) -> None:
    (made,) = _tools(target, tool_choice="none", max_tokens=8)["choices"]
    typed(made["message"]["content"], str, "content")
    demand(not made["message"].get("tool_calls"), "a call")


@check("2.4")
def an_unknown_tool_is_refused(target: Target) -> None:
    choice = {"type": "function", "function": {"name": "fly"}}
    body = {"messages": MESSAGES, "max_tokens": 8, "tools": [TOOL], "tool_choice": choice}
    error = json_of(status(target.post(CHAT_PATH, body), 422))
    same(message_of(error), "Tool error: Tool with name fly not found", "message")
    same(error["error_type"], "tool_error", "error_type")


@check("2.4")
def tools_and_a_format_are_refused(target: Target) -> None:
    body = {
        "messages": MESSAGES, "max_tokens": 8, "tools": [TOOL],
        "response_format": {"type": "json_schema", "value": {"name": "person", "schema": SCHEMA}},
    }  # fmt: skip
    error = json_of(status(target.post(CHAT_PATH, body), 422))
    same(message_of(error), BOTH, "message")
    same(error["error_type"], "tool_error", "error_type")


@check("9.6", WEIR)
def calls_have_ids_and_a_reason_of_their_own(target: Target) -> None:
    made = [_tools(target, tool_choice=NAMED)["choices"][0] for _ in range(2)]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in made}
    same(len(ids), 2, "number of ids")
    demand(all(one.startswith("call_") for one in ids), f"ids are {ids}")
    same([choice["finish_reason"] for choice in made], ["tool_calls"] * 2, "finish reasons")


@check("9.6", WEIR)
def calls_stream_name_first_then_arguments(target: Target) -> None:
    body = {"messages": MESSAGES, "max_tokens": 100, "tools": [TOOL], "tool_choice": "required", "stream": True}
    chunks = events(ok(target.post(CHAT_PATH, body)), done=True)
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or []]
    demand(deltas, "no call")
    same(deltas[0]["function"]["name"], "get_weather", "name")
    demand(deltas[0]["id"], "no id")
    same(len({delta["index"] for delta in deltas}), 1, "number of calls")
    demand(not any(delta["function"].get("name") for delta in deltas[1:]), "the name comes twice")
    arguments = "".join(delta["function"]["arguments"] or "" for delta in deltas)
    demand(json.loads(arguments)["city"] in ("Paris", "Rome"), f"arguments are {arguments!r}")
    same(chunks[-1]["choices"][0]["finish_reason"], "tool_calls", "finish_reason")


@check("9.6", WEIR)
def a_tools_answer_goes_back_into_the_chat(target: Target) -> None:
    call = _tools(target, tool_choice=NAMED)["choices"][0]["message"]
    messages = [*MESSAGES, call, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "Sunny, 21"}]
    body = {"messages": messages, "max_tokens": 8, "tools": [TOOL], "tool_choice": "none"}
    answer = json_of(ok(target.post(CHAT_PATH, body)))
    keys(answer["choices"][0]["message"], ["role", "content"], "message")
