"""Tools: which functions a model may call, and in which words families of models call them.

Knows no tokenizer, no grammar and no answer.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from serving.errors import ToolError

NAME: Final = "{}"  # stands for the function's name in the head of a call
WHITESPACE = "[ ]"  # in arguments, at most once between two parts of JSON: more would invite endless blanks
COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")  # beside these, `properties` are not all


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: a JSON schema of its arguments.
        strict: whether a keyword of the schema that cannot be enforced is an error.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The function as chat templates know it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": dict(self.parameters)}}

    def arguments_schema(self) -> dict[str, Any]:
        """What the arguments have to be: an object, without other properties than those that are listed."""
        schema: dict[str, Any] = {name: value for name, value in self.parameters.items() if value is not None}
        if "$ref" not in schema:  # which llguidance takes beside other keys only where it is not recursive
            schema["type"] = "object"
        if schema.get("additionalProperties") == "true":  # TGI's way to say so
            schema["additionalProperties"] = True
        elif _lists_all_properties(schema):
            schema.setdefault("additionalProperties", False)
        schema["x-guidance"] = {"whitespace_pattern": WHITESPACE, "lenient": not self.strict}
        return schema


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """In which words a family of models calls functions.

    A text holds blocks; a block is `opening`, `lead`, calls with `separator` between them, `trail` and `closing`; a
    call is its `head`, the arguments as a JSON object, and its `tail`.

    Attributes:
        opening: "" for a format whose calls are whole texts.
        head: the pieces before the arguments, with `NAME` for the function's; blanks may stand before each.
        separator: "" where a block holds one call.
        repeats: whether a text may hold several blocks.
        id_length: how many characters of a call's id the family's templates take; 0 for any number.
    """

    opening: str = ""
    lead: str = ""
    head: tuple[str, ...]
    tail: str = "}"
    separator: str = ""
    trail: str = ""
    closing: str = ""
    repeats: bool = False
    id_length: int = 0

    def head_of(self, tool: Tool) -> tuple[str, ...]:
        """The pieces before a call's arguments."""
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1]
        return tuple(piece.replace(NAME, name) for piece in self.head)


def _json_head(arguments: str) -> tuple[str, ...]:
    return ("{", '"name"', ": ", f'"{NAME}"', ", ", f'"{arguments}"', ": ")


HERMES = ToolFormat(
    opening="<tool_call>",
    lead="\n",
    head=_json_head("arguments"),
    trail="\n",
    closing="</tool_call>",
    repeats=True,
)
MISTRAL = ToolFormat(
    opening="[TOOL_CALLS]", lead="[", head=_json_head("arguments"), separator=", ", trail="]", id_length=9
)
MISTRAL_NAMED = ToolFormat(opening="[TOOL_CALLS]", head=(NAME, "[ARGS]"), tail="", repeats=True, id_length=9)
JSON = ToolFormat(head=_json_head("parameters"))  # Llama 3's, and what the default prompt asks for

FOREIGN = ("<function=", "<arg_key>")  # in a `<tool_call>` that holds no JSON


def format_of(template: str) -> ToolFormat:
    """The format that a chat template's source shows; JSON if it shows none that is known."""
    if MISTRAL.opening in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if HERMES.opening in template and not any(mark in template for mark in FOREIGN):
        return HERMES
    return JSON


class Demand(enum.Enum):
    """Whether the model has to call a function."""

    MAY = enum.auto()
    MUST = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says about tools.

    Attributes:
        tools: those that the model may call, at least one.
        several: whether one answer may hold several calls.
    """

    tools: Sequence[Tool]
    demand: Demand
    several: bool


def chosen(tools: Sequence[Tool], choice: str | None, *, parallel: bool) -> ToolUse | None:
    """What a request's `tools` and `tool_choice` come to; `None` if the model may call nothing.

    Args:
        choice: `None` or "auto", "none", "required", or a function's name.
        parallel: whether several calls in one answer are welcome.

    Raises:
        ToolError: the choice names a function that is not there, or the functions' names do not tell them apart.
    """
    _check_names(tools)
    if not tools or choice == "none":
        return None
    if choice is None or choice == "auto":
        return ToolUse(tools=tools, demand=Demand.MAY, several=parallel)
    if choice == "required":
        return ToolUse(tools=tools, demand=Demand.MUST, several=parallel)
    return named(tools, choice)


def named(tools: Sequence[Tool], name: str) -> ToolUse:
    """One call of the function with this name. Raises ToolError if there is none, and as `chosen`."""
    _check_names(tools)
    for tool in tools:
        if tool.name == name:
            return ToolUse(tools=[tool], demand=Demand.MUST, several=False)
    raise ToolError(f"Tool with name {name} not found")


def _check_names(tools: Sequence[Tool]) -> None:
    names: set[str] = set()
    for tool in tools:
        if not tool.name:
            raise ToolError("A tool needs a name")
        if tool.name in names:
            raise ToolError(f"Several tools have the name {tool.name}")
        names.add(tool.name)


def _lists_all_properties(schema: Mapping[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or any(name in schema for name in COMBINING):
        return False
    return isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required)
