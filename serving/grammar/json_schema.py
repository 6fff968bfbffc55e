"""JSON schemas as they are compiled: how the JSON is spaced, and objects that hold what they declare.

Knows no tokenizer and no automaton.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from serving.errors import ValidationError
from serving.nesting import is_deeper

MAX_DEPTH = 100  # of objects and arrays in each other

# The compiler's options, which no schema can override. At most one space, after a comma or a colon: a model that may
# write blanks without end does so. `oneOf` is taken as `anyOf`, as in TGI.
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "item_separator": ",[ ]?",
        "key_separator": ":[ ]?",
        "whitespace_flexible": False,
        "coerce_one_of": True,
        "lenient": False,
    }
)

_SINGLE = frozenset(("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"))
_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems", "items"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_ALTERNATIVES = frozenset(("$ref", "anyOf", "oneOf"))
_OBJECT_RULES = frozenset(("properties", "required", "additionalProperties", "patternProperties"))
_OTHER_MEMBERS = frozenset(
    ("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "propertyNames")
)

Schema = dict[str, Any]


def prepared(schema: Schema) -> Schema:
    """The schema to compile: with our options, and closed where it declares properties and says nothing of others.

    JSON schema lets such an object have any other member. A model would write some, and TGI never did; what is
    written stays valid under the schema as given. A schema that says in several places what one object may hold
    (`allOf`, or `properties` beside `anyOf`) is left as it is: each part closed, none could be met.

    Raises:
        ValidationError: nested too deeply.
    """
    if is_deeper(schema, MAX_DEPTH):
        raise ValidationError(f"grammar is not valid: it is nested more than {MAX_DEPTH} deep")
    made = schema if _is_composed(schema) else _closed(schema)
    return {**made, "x-guidance": dict(OPTIONS)}


def _closed(schema: Schema) -> Schema:
    made = _with_subschemas(schema, _closed)
    declared = schema.get("properties")
    if not isinstance(declared, dict) or not _OTHER_MEMBERS.isdisjoint(schema):
        return made
    required = schema.get("required", [])
    if isinstance(required, list) and all(isinstance(name, str) and name in declared for name in required):
        made["additionalProperties"] = False
    return made


def _is_composed(schema: Schema) -> bool:
    alternatives = _ALTERNATIVES & schema.keys()
    if "allOf" in schema or len(alternatives) > 1 or (alternatives and not _OBJECT_RULES.isdisjoint(schema)):
        return True
    return any(_is_composed(inner) for inner in _subschemas(schema))


def _subschemas(schema: Schema) -> Iterator[Schema]:
    found: list[Schema] = []

    def keep(inner: Schema) -> Schema:
        found.append(inner)
        return inner

    _with_subschemas(schema, keep)
    yield from found


def _with_subschemas(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """The schema with its direct subschemas changed; what is data (`enum`, `const`, `default`) is left alone."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, dict) else value

    made: Schema = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            made[key] = {name: changed(inner) for name, inner in value.items()}
        elif key in _LISTS and isinstance(value, list):
            made[key] = [changed(inner) for inner in value]
        elif key in _SINGLE:
            made[key] = changed(value)
        else:
            made[key] = value
    return made
