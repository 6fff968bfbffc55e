"""Tools with a real model: the demo model was taught to call these, and is held to any other."""

import json

import jsonschema
import openai
import pytest

pytestmark = pytest.mark.server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a place",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}
ALARM = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "parameters": {
            "type": "object",
            "properties": {
                "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                "days": {"type": "array", "items": {"enum": ["mon", "tue"]}, "maxItems": 2},
                "label": {"type": "string", "maxLength": 10},
            },
            "required": ["hour", "label"],
        },
    },
}
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, ALARM)}
QUESTION = "What is the weather in Paris?"


@pytest.fixture(scope="module")
def ask(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="-", max_retries=0) as client:

        def ask(text=QUESTION, messages=None, **fields):
            messages = messages or [{"role": "user", "content": text}]
            fields = {"temperature": 0, "max_tokens": 200, **fields}
            return client.chat.completions.create(model="tgi", messages=messages, **fields)

        yield ask


def check(call) -> None:
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


def test_what_the_model_was_taught_becomes_a_call(ask):
    (choice,) = ask(tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    check(call)
    messages = [
        {"role": "user", "content": QUESTION},
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"result": "sunny"}'},
    ]
    (choice,) = ask(messages=messages, tools=[WEATHER]).choices
    assert choice.finish_reason == "stop"
    assert "sunny" in choice.message.content


def test_a_greeting_is_answered_in_words(ask):
    (choice,) = ask("Hello!", tools=[WEATHER, ALARM]).choices
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert "Hello" in choice.message.content


def test_a_stream_says_the_same_as_the_whole_answer(ask):
    whole = ask(tools=[WEATHER])
    *chunks, last = ask(tools=[WEATHER], stream=True, stream_options={"include_usage": True})
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    (expected,) = whole.choices[0].message.tool_calls
    assert [call.function.name for call in calls if call.id] == [expected.function.name]
    assert "".join(call.function.arguments for call in calls) == expected.function.arguments
    assert len(calls) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    assert last.usage == whole.usage


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_alarm"}}])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_any_tool_is_called_validly_if_one_must_be(ask, choice, temperature):
    for seed in range(3):
        answer = ask(
            "Tell me something.", tools=[ALARM, WEATHER], tool_choice=choice, temperature=temperature, seed=seed
        )
        (choice_made,) = answer.choices
        assert choice_made.message.content is None
        assert choice_made.message.tool_calls
        assert choice == "required" or {call.function.name for call in choice_made.message.tool_calls} == {"set_alarm"}
        if choice_made.finish_reason != "length":
            assert choice_made.finish_reason == "tool_calls"
            for call in choice_made.message.tool_calls:
                check(call)
