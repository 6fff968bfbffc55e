"""LangChain: its classes for OpenAI's API and for TGI endpoints."""

import asyncio

import pydantic
from each import KEY, PROMPT, TOOL, URL, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_huggingface import HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI

chat = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model="tgi", temperature=0, max_tokens=12, max_retries=0)
long = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model="tgi", max_tokens=100, max_retries=0)


class City(pydantic.BaseModel):
    """Where it is."""

    city: str = pydantic.Field(pattern="^(Paris|Rome)$")


def can_invoke():
    """ChatOpenAI.invoke, batch"""
    answer = chat.invoke(PROMPT)
    assert answer.content
    assert answer.usage_metadata["total_tokens"] > 0
    assert [one.content for one in chat.batch([PROMPT, PROMPT])] == [answer.content] * 2


def can_stream():
    """ChatOpenAI.stream"""
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == chat.invoke(PROMPT).content


def can_do_it_asynchronously():
    """ChatOpenAI.ainvoke, astream"""

    async def both():
        whole = await chat.ainvoke(PROMPT)
        assert "".join([chunk.content async for chunk in chat.astream(PROMPT)]) == whole.content

    asyncio.run(both())


def can_call_tools():
    """ChatOpenAI.bind_tools, with the result sent back"""
    bound = long.bind_tools([TOOL], tool_choice="get_weather")
    answer = bound.invoke("What is the weather in Paris?")
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in ("Paris", "Rome")
    said = ToolMessage("Sunny", tool_call_id=call["id"])
    again = chat.bind_tools([TOOL], tool_choice="none").invoke([HumanMessage("Weather?"), answer, said])
    assert isinstance(again.content, str)


def can_stream_tool_calls():
    """ChatOpenAI.bind_tools(...).stream"""
    bound = long.bind_tools([TOOL], tool_choice="get_weather")
    chunks = list(bound.stream("What is the weather in Paris?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def can_ask_for_a_model():
    """ChatOpenAI.with_structured_output, by JSON schema and by a function"""
    for method in ("json_schema", "function_calling"):
        assert long.with_structured_output(City, method=method).invoke("Where?").city in ("Paris", "Rome"), method


def can_complete():
    """OpenAI.invoke, stream"""
    model = OpenAI(base_url=f"{URL}/v1", api_key=KEY, model="tgi", temperature=0, max_tokens=8, max_retries=0)
    text = model.invoke(PROMPT)
    assert text
    assert "".join(model.stream(PROMPT)) == text


def can_ask_an_endpoint():
    """HuggingFaceEndpoint.invoke, stream"""
    # It sends its own token to Hugging Face's hosts only.
    key = {"headers": {"Authorization": f"Bearer {KEY}"}}
    endpoint = HuggingFaceEndpoint(endpoint_url=URL, server_kwargs=key, max_new_tokens=8, do_sample=False)
    text = endpoint.invoke(PROMPT)
    assert text
    assert "".join(endpoint.stream(PROMPT)) == text


run(globals())
