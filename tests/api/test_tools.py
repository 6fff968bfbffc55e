"""Tools over OpenAI's chat route: what the model is told, what it may say, and what becomes of it."""

import json

import httpx2
import openai
import pytest

URL = "/v1/chat/completions"
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{{ message.tool_calls or '' }}\n"
    "{% endfor %}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{# calls are written <tool_call>{...}</tool_call> #}<assistant>"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def chat(text: str, **fields):
    return {
        "messages": [{"role": "user", "content": f"say:{text}".replace("\n", "␤")}],
        "tools": [WEATHER, CLOCK],
        **fields,
    }


@pytest.fixture(scope="module")
def server(serve_module):
    return serve_module(template=TEMPLATE, max_total_tokens=2048, grammars=True)


@pytest.fixture(scope="module")
def plain(serve_module):
    """A server whose template knows no tools and that follows no grammars."""
    return serve_module(max_total_tokens=2048)


@pytest.fixture(scope="module")
def seen(server):
    """A function that posts a chat and returns the prompt and the grammar that reached the device."""
    started = server.started()

    def ask(body):
        started.clear()
        response = server.client.post(URL, data=json.dumps(body), content_type="application/json")
        assert response.status_code == 200, response.text
        ((prompt, sampling),) = started
        return prompt, sampling.grammar

    return ask


def test_a_call_is_a_message_without_content(client):
    whole = client.post(URL, json=chat(CALL)).json
    (choice,) = whole["choices"]
    message = choice["message"]
    assert list(message) == ["role", "tool_calls"]
    (call,) = message["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
    assert choice["finish_reason"] == "tool_calls"
    assert whole["usage"]["completion_tokens"] == len(CALL) + 1


def test_text_before_calls_is_content(client):
    (choice,) = client.post(URL, json=chat(f"I look. {TWO}")).json["choices"]
    assert list(choice["message"]) == ["role", "content", "tool_calls"]
    assert choice["message"]["content"] == "I look."
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "get_time"]
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2


def test_an_answer_without_calls_is_an_answer(client):
    for text in ("Hello <tool_cal", ""):
        (choice,) = client.post(URL, json=chat(text)).json["choices"]
        assert choice["message"] == {"role": "assistant", "content": text}
        assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_ends_with_length(client):
    (choice,) = client.post(URL, json=chat(CALL, max_tokens=CALL.index("nn"))).json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bo'


def test_a_stop_text_in_a_call_ends_it_as_a_stop(client):
    (choice,) = client.post(URL, json=chat(CALL, stop=["nn"])).json["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bo'


def test_each_of_several_answers_has_its_own_calls(client, events):
    choices = client.post(URL, json=chat(CALL, n=2, seed=1)).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    ids = {call["id"] for choice in choices for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2
    *chunks, _ = events(client.post(URL, json=chat(CALL, n=2, seed=1, stream=True)))
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        calls = [call for choice in own for call in choice["delta"].get("tool_calls", ())]
        assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bonn"}'
        assert own[-1]["finish_reason"] == "tool_calls"


def test_a_stream_has_names_once_then_arguments_then_the_end(client, events):
    asked = chat(f"See. {TWO}", stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(client.post(URL, json=asked))
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(f"See. {TWO}") + 1
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert {delta["role"] for delta in deltas} == {"assistant"}
    assert "".join(delta.get("content", "") for delta in deltas) == "See."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    begun = [call for call in calls if "id" in call]
    assert [list(call) for call in begun] == [["index", "id", "type", "function"]] * 2
    assert [(call["index"], call["type"], call["function"]["name"]) for call in begun] == [
        (0, "function", "get_weather"),
        (1, "function", "get_time"),
    ]
    assert all(list(call) == ["index", "function"] for call in calls if call not in begun)
    for index, arguments in enumerate(['{"city": "Bonn"}', "{}"]):
        pieces = [call["function"]["arguments"] for call in calls if call["index"] == index]
        assert "".join(pieces) == arguments
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_a_stream_without_calls_is_text(client, events):
    *chunks, _ = events(client.post(URL, json=chat("Hello <tool_x", stream=True)))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello <tool_x"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_cover_every_token_of_a_call(client, events):
    asked = chat(CALL, logprobs=True, top_logprobs=2)
    (choice,) = client.post(URL, json=asked).json["choices"]
    assert len(choice["logprobs"]["content"]) == len(CALL) + 1
    *chunks, _ = events(client.post(URL, json={**asked, "stream": True}))
    assert sum(len(chunk["choices"][0]["logprobs"]["content"]) for chunk in chunks) == len(CALL) + 1


def test_the_template_gets_the_tools(seen):
    prompt, _ = seen(chat("x"))
    listed = prompt.partition("<tools>")[2].partition("<assistant>")[0]
    clock = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
    assert listed == json.dumps(WEATHER) + json.dumps(clock)


def test_the_original_word_for_parameters_is_understood(seen):
    function = dict(WEATHER["function"])
    function["arguments"] = function.pop("parameters")
    tools = [{"type": "function", "function": function}]
    assert seen(chat("x", tools=tools)) == seen(chat("x", tools=[WEATHER]))


@pytest.mark.parametrize(
    "fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}, {"tools": [], "tool_choice": "required"}]
)
def test_without_tools_nothing_is_told_and_nothing_is_a_call(server, seen, fields):
    prompt, grammar = seen(chat(CALL, **fields))
    assert "<tools>" not in prompt
    assert grammar is None
    (choice,) = server.client.post(URL, json=chat(CALL, **fields)).json["choices"]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


def test_a_chosen_tool_is_the_only_one(seen):
    named = {"type": "function", "function": {"name": "get_time"}}
    prompt, grammar = seen(chat("x", tool_choice=named))
    assert "get_time" in prompt
    assert "get_weather" not in prompt + grammar.source
    assert seen(chat("x", tool_choice="get_time")) == (prompt, grammar)


def test_what_must_be_called_and_what_may_be_are_different_grammars(seen):
    grammars = [
        seen(chat("x", **fields))[1].source
        for fields in (
            {},
            {"tool_choice": "auto", "parallel_tool_calls": True},
            {"parallel_tool_calls": False},
            {"tool_choice": "required"},
        )
    ]
    assert grammars[0] == grammars[1]
    assert len(set(grammars)) == 3


def test_a_conversation_with_results_reaches_the_template_in_parts(seen):
    calls = [{"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET"}'}}]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "name": "get_time", "content": "10:30"},
        {"role": "user", "content": "say:x"},
    ]
    prompt, _ = seen({"messages": messages, "tools": [CLOCK]})
    assert "'arguments': {'zone': 'CET'}" in prompt
    assert "<tool>10:30" in prompt


def test_arguments_that_are_no_object_stay_as_they_are(seen):
    for arguments in ("not json", "[1]", {"zone": "CET"}):
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        messages = [{"role": "assistant", "tool_calls": calls}, {"role": "user", "content": "say:x"}]
        prompt, _ = seen({"messages": messages})
        assert repr(arguments) in prompt


def test_a_clients_prompt_for_tools_stands_behind_its_message(seen):
    prompt, _ = seen(chat("x", tool_prompt="Call something!"))
    assert "<user>say:x\n---\nCall something!\n" in prompt


def test_a_template_without_tools_gets_them_in_the_last_message(plain):
    sent = chat('{"name": "get_time", "parameters": {}}')
    response = plain.client.post(URL, json=sent)
    (call,) = response.json["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_time", "arguments": "{}"}
    without = plain.client.post(URL, json={**sent, "tools": []})
    assert int(response.headers["x-compute-characters"]) > int(without.headers["x-compute-characters"]) + 200


def test_without_grammars_a_model_may_call_and_need_not(plain):
    response = plain.client.post(URL, json=chat("x", tool_choice="required"))
    assert response.status_code == 422
    assert response.json["error"]["message"] == "Input validation error: grammar is not supported"
    assert plain.client.post(URL, json=chat("x")).status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "nope"}, "Tool with name nope not found"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "Tool with name nope not found"),
        ({"tools": [CLOCK, WEATHER, CLOCK]}, "Several tools have the name get_time"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "A tool needs a name"),
        ({"response_format": {"type": "json_object"}}, "Grammar and tools are mutually exclusive"),
        (
            {"response_format": {"type": "json_object"}, "tool_choice": "none"},
            "Grammar and tools are mutually exclusive",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_cannot_be_used_are_refused(client, fields, message, stream):
    response = client.post(URL, json=chat("x", stream=stream, **fields))
    assert response.status_code == 422
    assert response.json == {
        "error": {"message": f"Tool error: {message}", "type": "invalid_request_error", "param": None, "code": None},
        "error_type": "tool_error",
    }


def test_no_tools_and_a_format_are_accepted(client):
    assert client.post(URL, json=chat("x", tools=[], response_format={"type": "json_object"})).status_code == 200
    assert client.post(URL, json=chat("x", response_format={"type": "text"})).status_code == 200


def test_a_strict_schema_that_cannot_be_followed_is_refused(client):
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "haiku"}}}
    for strict, status in ((True, 422), (False, 200)):
        function = {"name": "f", "parameters": odd, "strict": strict}
        asked = chat("x", tools=[{"type": "function", "function": function}])
        assert client.post(URL, json=asked).status_code == status


@pytest.mark.parametrize(
    "broken",
    [
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]},
        {"tools": {}},
        {"tool_choice": 1},
        {"tool_choice": {"type": "function"}},
        {"chat_template_kwargs": []},
    ],
)
def test_other_shapes_are_refused_by_the_framework(client, broken):
    response = client.post(URL, json=chat("x", **broken))
    assert response.status_code == 422
    assert response.text.startswith("Failed to deserialize the JSON body into the target type: ")


class TestOpenAIClient:
    """OpenAI's own client, without a network."""

    @pytest.fixture
    def ask(self, server):
        transport = httpx2.WSGITransport(app=server.app)
        with openai.OpenAI(
            base_url="http://weir/v1", api_key="-", max_retries=0, http_client=httpx2.Client(transport=transport)
        ) as client:
            yield lambda text, **fields: client.chat.completions.create(model="tgi", **chat(text, **fields))

    def test_a_call_and_its_result(self, ask):
        (choice,) = ask(CALL).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Bonn"}
        messages = [
            {"role": "user", "content": "a"},
            choice.message,
            {"role": "tool", "tool_call_id": call.id, "content": "say:sunny"},
        ]
        assert ask("", messages=messages).choices[0].message.content == "sunny"

    def test_a_streamed_call(self, ask):
        names, arguments = {}, {}
        for chunk in ask(f"See. {TWO}", stream=True):
            for call in chunk.choices[0].delta.tool_calls or ():
                if call.id:
                    names[call.index] = call.function.name
                arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
        assert names == {0: "get_weather", 1: "get_time"}
        assert arguments == {0: '{"city": "Bonn"}', 1: "{}"}
        assert chunk.choices[0].finish_reason == "tool_calls"

    def test_a_refused_choice(self, ask):
        with pytest.raises(openai.UnprocessableEntityError, match="Tool with name nope not found"):
            ask("x", tool_choice={"type": "function", "function": {"name": "nope"}})

    def test_the_clients_accumulating_stream(self, server):
        transport = httpx2.WSGITransport(app=server.app)
        with (
            openai.OpenAI(
                base_url="http://weir/v1", api_key="-", max_retries=0, http_client=httpx2.Client(transport=transport)
            ) as client,
            client.chat.completions.stream(model="tgi", **chat(f"See. {TWO}")) as stream,
        ):
            for _ in stream:
                pass
            message = stream.get_final_completion().choices[0].message
        assert message.content == "See."
        assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
            ("get_weather", '{"city": "Bonn"}'),
            ("get_time", "{}"),
        ]
