"""OpenAI's own client."""

import asyncio
import contextlib
import json

import openai
import pydantic
from each import CITY, KEY, NAMED, PROMPT, QUESTION, TOOL, URL, WEATHER, raises, run

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60)
GREEDY = {"model": "tgi", "temperature": 0, "max_tokens": 12}


class Person(pydantic.BaseModel):
    name: str
    age: int


def can_chat():
    """chat.completions.create"""
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def can_stream_a_chat():
    """chat.completions.create(stream=True, stream_options=...)"""
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY)
    chunks = list(
        client.chat.completions.create(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def can_use_the_streaming_helper():
    """chat.completions.stream"""
    with client.chat.completions.stream(messages=QUESTION, **{**GREEDY, "max_tokens": 200}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content


def can_ask_for_logprobs():
    """chat.completions.create(logprobs=True, top_logprobs=...)"""
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) >= 2 for token in content)


def can_ask_for_several_choices():
    """chat.completions.create(n=2)"""
    answer = client.chat.completions.create(model="tgi", messages=QUESTION, n=2, temperature=1, seed=1, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1]


def can_set_every_sampling_parameter():
    """chat.completions.create(stop, seed, logit_bias, penalties, max_completion_tokens, user)"""
    asked = {
        "model": "tgi", "messages": QUESTION, "max_completion_tokens": 8, "stop": ["zzz", "yyy"], "seed": 5,
        "top_p": 0.9, "temperature": 0.8, "frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": {"7": -5},
        "user": "me",
    }  # fmt: skip
    texts = [client.chat.completions.create(**asked).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1]


def can_call_tools():
    """chat.completions.create(tools, tool_choice), with the result sent back"""
    answer = client.chat.completions.create(
        model="tgi", messages=WEATHER, tools=[TOOL], tool_choice=NAMED, max_tokens=100
    )
    choice = answer.choices[0]
    assert choice.finish_reason in ("tool_calls", "stop")  # OpenAI says `stop` where the call was named
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    said = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    again = client.chat.completions.create(
        model="tgi", messages=[*WEATHER, choice.message, said], tools=[TOOL], tool_choice="none", max_tokens=8
    )
    assert isinstance(again.choices[0].message.content, str)
    assert client.chat.completions.create(messages=WEATHER, tools=[TOOL], tool_choice="auto", **GREEDY).choices


def can_stream_tool_calls():
    """chat.completions.create(tools, stream=True)"""
    stream = client.chat.completions.create(
        model="tgi", messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True
    )
    name, arguments, end = "", "", None
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        end = chunk.choices[0].finish_reason or end
    assert (name, end) == ("get_weather", "tool_calls")
    assert json.loads(arguments)["city"] in ("Paris", "Rome")


def can_ask_for_a_schema():
    """chat.completions.create(response_format={"type": "json_schema", ...})"""
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    answer = client.chat.completions.create(model="tgi", messages=WEATHER, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def can_parse_into_a_model():
    """chat.completions.parse"""
    for seed in range(6):  # a string of the model's own choice may be longer than the answer
        with contextlib.suppress(openai.LengthFinishReasonError):
            answer = client.chat.completions.parse(
                model="tgi", messages=QUESTION, response_format=Person, max_tokens=300, seed=seed
            )
            assert isinstance(answer.choices[0].message.parsed, Person)
            return
    raise AssertionError("no answer came to an end")


def can_complete():
    """completions.create with one prompt, several, token ids, echo and logprobs"""
    one = client.completions.create(prompt=PROMPT, **GREEDY)
    assert one.object == "text_completion"
    several = client.completions.create(prompt=[PROMPT, "Weir is"], **GREEDY)
    assert sorted(choice.index for choice in several.choices) == [0, 1]
    assert next(choice.text for choice in several.choices if choice.index == 0) == one.choices[0].text
    assert client.completions.create(prompt=[1, 2, 3], **GREEDY).usage.prompt_tokens == 3
    echoed = client.completions.create(prompt=PROMPT, echo=True, **GREEDY)
    assert echoed.choices[0].text == PROMPT + one.choices[0].text
    logprobs = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0].logprobs
    assert "".join(logprobs.tokens) == one.choices[0].text


def can_stream_a_completion():
    """completions.create(stream=True)"""
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text


def can_list_models():
    """models.list and models.retrieve"""
    served = client.models.list().data[0]
    assert client.models.retrieve(served.id).id == served.id


def can_tell_errors_apart():
    """AuthenticationError, NotFoundError, UnprocessableEntityError"""
    stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0)
    error = raises(openai.AuthenticationError, stranger.chat.completions.create, messages=QUESTION, **GREEDY)
    assert error.status_code == 401
    error = raises(openai.NotFoundError, client.models.retrieve, "no-such-model")
    assert error.code == "model_not_found"
    for stream in (False, True):
        error = raises(
            openai.UnprocessableEntityError, client.chat.completions.create, model="tgi", messages=QUESTION, top_p=0,
            stream=stream,
        )  # fmt: skip
        assert "`top_p` must be > 0.0 and < 1.0" in error.message
        assert error.type == "invalid_request_error"
    raises(openai.UnprocessableEntityError, client.chat.completions.create, model="tgi", messages="no list")


def can_tell_overload():
    """RateLimitError"""
    endless = {"messages": QUESTION, "model": "tgi", "max_tokens": 1500, "stream": True}
    with contextlib.ExitStack() as open_streams:
        for _ in range(4):  # as many as the server has permits
            stream = client.chat.completions.create(**endless, extra_body={"ignore_eos": True})
            next(iter(open_streams.enter_context(stream)))
        error = raises(openai.RateLimitError, client.chat.completions.create, messages=QUESTION, **GREEDY)
        assert int(error.response.headers["retry-after"]) >= 1
        assert error.type == "rate_limit_error"


def can_do_it_asynchronously():
    """AsyncOpenAI: chat, streamed chat, completion"""

    async def everything():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=2, timeout=60) as patient:
            whole = await patient.chat.completions.create(messages=QUESTION, **GREEDY)
            stream = await patient.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content
            assert (await patient.completions.create(prompt=PROMPT, **GREEDY)).choices[0].text

    asyncio.run(everything())


run(globals())
