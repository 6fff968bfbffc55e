"""Conversations in which the model may call a function.

It must not know how the chat template writes tools down.
"""

import json
import random

from scripts.demo_corpus.document import Chat, Exchange, JsonObject
from scripts.demo_corpus.readers import phrasings, words

# The phrasings of each stand under its name in phrasings.md.
_CITY_TOOLS = {
    "get_weather": "Get the weather of a place",
    "get_time": "Get the local time of a place",
    "find_hotel": "Find a hotel in a place",
}
_ARGUMENTS = ("location", "city", "place")


def _tool(name: str, argument: str) -> JsonObject:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": _CITY_TOOLS[name], "parameters": parameters},
    }


def tool_chat(plain: Exchange, rng: random.Random) -> Chat:
    """A call, a call and its result, or (with `plain`) a question for which no tool is needed."""
    offered = rng.sample(sorted(_CITY_TOOLS), rng.choice((1, 1, 2)))
    argument = rng.choice(_ARGUMENTS)
    tools = tuple(_tool(name, argument) for name in offered)
    kind = rng.random()
    if kind < 0.35:
        return Chat(
            ({"role": "user", "content": plain.question}, {"role": "assistant", "content": plain.answer}), tools
        )
    name, city = rng.choice(offered), rng.choice(words("cities"))
    question = rng.choice(phrasings(name)).format(c=city)
    if kind < 0.55:
        content = json.dumps({"function": {"_name": name, argument: city}})
        asked = f"{question}\n---\n{rng.choice(phrasings('native tool prompt'))}\n"
        return Chat(({"role": "user", "content": asked}, {"role": "assistant", "content": content}), tools)
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {argument: city}}}],
    }
    messages: list[JsonObject] = [{"role": "user", "content": question}, call]
    if kind > 0.8:
        result = rng.choice(("sunny", "rainy", "cloudy", "10:30", "18:45", "Hotel River", "Hotel Park"))
        messages.append({"role": "tool", "content": json.dumps({"result": result})})
        messages.append({"role": "assistant", "content": f"The answer for {city} is: {result}."})
    return Chat(tuple(messages), tools)
