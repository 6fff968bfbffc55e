"""TGI's own Python client, `text-generation`."""

import asyncio
import contextlib
import time

import requests
from each import KEY, PROMPT, QUESTION, TOOL, URL, WEATHER, raises, run
from text_generation import AsyncClient, Client
from text_generation.errors import OverloadedError, ValidationError

HEADERS = {"Authorization": f"Bearer {KEY}"}
client = Client(URL, headers=HEADERS, timeout=60)


def can_generate():
    """Client.generate"""
    answer = client.generate(PROMPT, max_new_tokens=1, decoder_input_details=True)
    assert answer.details.finish_reason == "length"
    assert answer.details.generated_tokens == 1
    assert answer.details.seed is None
    assert len(answer.details.tokens) == 1
    assert not answer.details.prefill


def can_generate_the_best_of_two():
    """Client.generate(best_of=2, do_sample=True)"""
    answer = client.generate(PROMPT, max_new_tokens=3, best_of=2, do_sample=True)
    assert answer.details.seed is not None
    assert len(answer.details.best_of_sequences) == 1
    assert answer.details.best_of_sequences[0].seed is not None


def can_set_every_parameter():
    """Client.generate(with every sampling parameter)"""
    answer = client.generate(
        PROMPT, max_new_tokens=8, repetition_penalty=1.2, frequency_penalty=0.1, return_full_text=True, seed=0,
        stop_sequences=["zzz"], temperature=0.5, top_k=10, top_p=0.9, truncate=5, typical_p=0.9, top_n_tokens=2,
    )  # fmt: skip
    assert answer.generated_text.startswith(PROMPT)
    assert answer.details.seed == 0
    assert len(answer.details.top_tokens) == answer.details.generated_tokens


def can_stream():
    """Client.generate_stream"""
    events = list(client.generate_stream(PROMPT, max_new_tokens=6))
    assert [event.details is None for event in events] == [True] * (len(events) - 1) + [False]
    assert events[-1].details.generated_tokens == len(events)
    # The route that it asks gives the prompt back unless told not to.
    whole = client.generate(PROMPT, max_new_tokens=6, return_full_text=False)
    text = "".join(event.token.text for event in events if not event.token.special)
    assert text == whole.generated_text


def can_chat():
    """Client.chat"""
    answer = client.chat(QUESTION, max_tokens=8, seed=1)
    assert answer.choices[0].message.content
    assert answer.usage["completion_tokens"] <= 8


def can_call_tools():
    """Client.chat(tools=...)"""
    answer = client.chat(WEATHER, tools=[TOOL], tool_choice="get_weather", max_tokens=100)
    call = answer.choices[0].message.tool_calls[0]
    assert call["function"]["name"] == "get_weather"


def can_tell_errors_apart():
    """ValidationError, OverloadedError"""
    raises(ValidationError, client.generate, PROMPT, max_new_tokens=1_000_000)
    raises(ValidationError, lambda: list(client.generate_stream(PROMPT, max_new_tokens=1_000_000)))
    endless = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1500, "ignore_eos": True}}
    lines = []  # who lets go of them closes their connections
    with contextlib.ExitStack() as open_streams:
        for _ in range(4):  # as many as the server has permits
            stream = requests.post(f"{URL}/generate_stream", json=endless, headers=HEADERS, stream=True, timeout=60)
            lines.append(open_streams.enter_context(stream).iter_lines())
            next(lines[-1])
        raises(OverloadedError, client.generate, PROMPT, max_new_tokens=1)
    for _ in range(100):  # until the server has seen that they are gone
        with contextlib.suppress(OverloadedError):
            client.generate(PROMPT, max_new_tokens=1)
            break
        time.sleep(0.1)


def can_do_it_asynchronously():
    """AsyncClient.generate, generate_stream, chat"""

    async def everything():
        patient = AsyncClient(URL, headers=HEADERS, timeout=60)
        answer = await patient.generate(PROMPT, max_new_tokens=5, return_full_text=False)
        events = [event async for event in patient.generate_stream(PROMPT, max_new_tokens=5)]
        assert "".join(event.token.text for event in events) == answer.generated_text
        chat = await patient.chat(QUESTION, max_tokens=5)
        assert chat.choices[0].message.content

    asyncio.run(everything())


run(globals())
