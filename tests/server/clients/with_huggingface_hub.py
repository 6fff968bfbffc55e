"""Hugging Face's InferenceClient."""

import asyncio
import json

from each import CITY, KEY, PROMPT, QUESTION, TOOL, URL, WEATHER, raises, run
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

client = InferenceClient(base_url=URL, api_key=KEY, timeout=60)
raw = InferenceClient(model=URL, token=KEY, timeout=60)
NUMBER = {"type": "regex", "value": "[0-9]{3}"}
# It asks `/`, which gives the prompt back unless told not to.
BARE = {"return_full_text": False}


def can_generate():
    """text_generation"""
    assert isinstance(raw.text_generation(PROMPT, max_new_tokens=5), str)


def can_generate_with_details():
    """text_generation(details=True, decoder_input_details, top_n_tokens, seed, best_of)"""
    answer = raw.text_generation(PROMPT, max_new_tokens=5, details=True)
    assert answer.details.finish_reason in ("length", "eos_token")
    assert len(answer.details.tokens) == answer.details.generated_tokens
    assert answer.details.seed is None
    assert raw.text_generation(PROMPT, max_new_tokens=2, details=True, decoder_input_details=True).details.prefill == []
    drawn = raw.text_generation(PROMPT, max_new_tokens=5, details=True, do_sample=True, seed=9)
    assert drawn.details.seed == 9
    best = raw.text_generation(PROMPT, max_new_tokens=5, details=True, do_sample=True, best_of=2)
    assert len(best.details.best_of_sequences) == 1
    tops = raw.text_generation(PROMPT, max_new_tokens=3, details=True, top_n_tokens=2)
    assert len(tops.details.top_tokens) == 3


def can_stream():
    """text_generation(stream=True)"""
    text = raw.text_generation(PROMPT, max_new_tokens=8, **BARE)
    assert "".join(raw.text_generation(PROMPT, max_new_tokens=8, stream=True, **BARE)) == text


def can_stream_with_details():
    """text_generation(stream=True, details=True)"""
    events = list(raw.text_generation(PROMPT, max_new_tokens=8, stream=True, **BARE, details=True))
    assert events[-1].details.generated_tokens == len(events)
    assert events[-1].generated_text == raw.text_generation(PROMPT, max_new_tokens=8, **BARE)
    assert events[0].token.id >= 0


def can_stop():
    """text_generation(stop=...)"""
    text = raw.text_generation(PROMPT, max_new_tokens=20, **BARE)
    stop = text[4:8]
    answer = raw.text_generation(PROMPT, max_new_tokens=20, **BARE, stop=[stop], details=True)
    assert answer.generated_text == text[: text.index(stop) + 4]
    assert answer.details.finish_reason == "stop_sequence"


def can_return_the_prompt():
    """text_generation(return_full_text=True, truncate, penalties, top_k, top_p, typical_p, temperature)"""
    assert raw.text_generation(PROMPT, max_new_tokens=2, return_full_text=True).startswith(PROMPT)
    assert isinstance(
        raw.text_generation(
            PROMPT, max_new_tokens=4, truncate=50, repetition_penalty=1.1, frequency_penalty=0.1, top_k=9, top_p=0.9,
            typical_p=0.9, temperature=0.7, seed=1,
        ),
        str,
    )  # fmt: skip


def can_follow_a_grammar():
    """text_generation(grammar=...), JSON schema and regex"""
    text = raw.text_generation("A city:", max_new_tokens=60, **BARE, grammar={"type": "json", "value": CITY})
    assert json.loads(text)["city"] in ("Paris", "Rome")
    assert raw.text_generation("A number:", max_new_tokens=9, **BARE, grammar=NUMBER).isdigit()


def can_chat():
    """chat_completion"""
    answer = client.chat_completion(QUESTION, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > 0
    assert client.chat.completions.create(messages=QUESTION, max_tokens=12, temperature=0).choices == answer.choices


def can_stream_a_chat():
    """chat_completion(stream=True, stream_options=...)"""
    whole = client.chat_completion(QUESTION, max_tokens=12, temperature=0)
    chunks = list(
        client.chat_completion(
            QUESTION, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def can_ask_for_logprobs():
    """chat_completion(logprobs=True, top_logprobs, n, stop, seed, penalties, logit_bias)"""
    answer = client.chat_completion(
        QUESTION, max_tokens=6, logprobs=True, top_logprobs=2, n=1, stop=["zzz"], seed=3, top_p=0.9, temperature=0.8,
        frequency_penalty=0.1, presence_penalty=0.1,
    )  # fmt: skip
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def can_call_tools():
    """chat_completion(tools, tool_choice), whole and streamed"""
    answer = client.chat_completion(WEATHER, tools=[TOOL], tool_choice="get_weather", max_tokens=100)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    arguments = call.function.arguments
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert arguments["city"] in ("Paris", "Rome")
    chunks = list(client.chat_completion(WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True))
    deltas = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or []]
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas))["city"] in ("Paris", "Rome")


def can_ask_for_a_schema():
    """chat_completion(response_format=...), OpenAI's shape and TGI's"""
    for form in (
        {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        {"type": "json", "value": CITY},
    ):
        answer = client.chat_completion(WEATHER, response_format=form, max_tokens=60)
        assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def can_tell_errors():
    """errors as HfHubHTTPError with the status and the message"""
    error = raises(HfHubHTTPError, client.chat_completion, QUESTION, top_p=0.0)
    assert error.response.status_code == 422
    stranger = InferenceClient(base_url=URL, api_key="wrong")
    assert raises(HfHubHTTPError, stranger.chat_completion, QUESTION).response.status_code == 401


def can_do_it_asynchronously():
    """AsyncInferenceClient: text_generation, chat_completion, streams"""

    async def everything():
        patient = AsyncInferenceClient(model=URL, token=KEY, timeout=60)
        text = await patient.text_generation(PROMPT, max_new_tokens=5, **BARE)
        stream = await patient.text_generation(PROMPT, max_new_tokens=5, stream=True)
        assert "".join([piece async for piece in stream]) == text
        chats = await patient.chat_completion(QUESTION, max_tokens=5, stream=True)
        assert [chunk async for chunk in chats]

    asyncio.run(everything())


run(globals())
