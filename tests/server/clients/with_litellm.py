"""LiteLLM, by its OpenAI and Hugging Face providers."""

import asyncio
import json

import litellm
from each import CITY, KEY, NAMED, PROMPT, QUESTION, TOOL, URL, WEATHER, raises, run

OPENAI = {"model": "openai/tgi", "api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0, "timeout": 60}
HUGGING_FACE = {"model": "huggingface/tgi", "api_base": f"{URL}/v1/chat/completions", "api_key": KEY, "timeout": 60}


def can_complete_by_openai():
    """completion(model="openai/...")"""
    answer = litellm.completion(messages=QUESTION, max_tokens=12, temperature=0, **OPENAI)
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > 0


def can_stream_by_openai():
    """completion(model="openai/...", stream=True)"""
    whole = litellm.completion(messages=QUESTION, max_tokens=12, temperature=0, **OPENAI)
    chunks = litellm.completion(messages=QUESTION, max_tokens=12, temperature=0, stream=True, **OPENAI)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def can_call_tools():
    """completion(model="openai/...", tools, tool_choice)"""
    answer = litellm.completion(messages=WEATHER, tools=[TOOL], tool_choice=NAMED, max_tokens=100, **OPENAI)
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def can_ask_for_a_schema():
    """completion(model="openai/...", response_format)"""
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = litellm.completion(messages=WEATHER, response_format=form, max_tokens=60, **OPENAI)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def can_complete_text():
    """text_completion(model="text-completion-openai/...")"""
    answer = litellm.text_completion(prompt=PROMPT, max_tokens=6, **{**OPENAI, "model": "text-completion-openai/tgi"})
    assert answer.choices[0].text


def can_complete_by_hugging_face():
    """completion(model="huggingface/..."), whole and streamed"""
    whole = litellm.completion(messages=QUESTION, max_tokens=12, temperature=0, **HUGGING_FACE)
    assert whole.choices[0].message.content
    chunks = litellm.completion(messages=QUESTION, max_tokens=12, temperature=0, stream=True, **HUGGING_FACE)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def can_tell_errors_apart():
    """AuthenticationError, UnprocessableEntityError"""
    stranger = {**OPENAI, "api_key": "wrong"}
    raises(litellm.AuthenticationError, litellm.completion, messages=QUESTION, **stranger)
    kinds = (litellm.UnprocessableEntityError, litellm.BadRequestError)
    error = raises(kinds, litellm.completion, messages=QUESTION, top_p=0, **OPENAI)
    assert "top_p" in str(error)


def can_do_it_asynchronously():
    """acompletion"""

    async def later():
        return await litellm.acompletion(messages=QUESTION, max_tokens=6, **OPENAI)

    assert asyncio.run(later()).choices[0].message.content


run(globals())
