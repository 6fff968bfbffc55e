"""Run what a client's script can do, one call after the other, and say in JSON what came of each.

Knows no client; every script is run by the Python of its client's own environment.
"""

import json
import sys
import traceback
from collections.abc import Mapping

PROMPT = "What is Deep Learning?"
QUESTION = [{"role": "user", "content": PROMPT}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": CITY},
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}

URL, KEY = sys.argv[1:3]


def run(names: Mapping[str, object]) -> None:
    """Call every `can_...` of a script; exit with 1 if one failed."""
    failed, done = {}, []
    for name, call in names.items():
        if name.startswith("can_") and callable(call):
            try:
                call()
                done.append(name)
            except Exception:
                failed[name] = traceback.format_exc()[-3000:]
    sys.stdout.write(json.dumps({"done": done, "failed": failed}) + "\n")
    sys.exit(bool(failed))


def raises(kind: type[BaseException], call: object, *arguments: object, **options: object) -> BaseException:
    """The error of this kind that a call ends with."""
    assert callable(call)
    try:
        call(*arguments, **options)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")
