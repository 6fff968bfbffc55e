"""How schemas are changed before they are compiled."""

import copy

import pytest

from serving.errors import ValidationError
from serving.grammar.json_schema import MAX_DEPTH, OPTIONS, prepared

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}
CLOSED = {**POINT, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "made"),
    [
        (POINT, CLOSED),
        ({**POINT, "required": ["x"]}, {**CLOSED, "required": ["x"]}),
        ({"type": "array", "items": POINT}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [POINT, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$defs": {"p": POINT}, "$ref": "#/$defs/p"}, {"$defs": {"p": CLOSED}, "$ref": "#/$defs/p"}),
        (
            {"properties": {"properties": POINT}},
            {"properties": {"properties": CLOSED}, "additionalProperties": False},
        ),
    ],
)
def test_an_object_that_declares_properties_holds_no_others(schema, made):
    assert prepared(schema) == {**made, "x-guidance": dict(OPTIONS)}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**POINT, "additionalProperties": {"type": "null"}},
        {**POINT, "patternProperties": {"^y": {}}},
        {**POINT, "required": ["x", "elsewhere"]},
        {**POINT, "minProperties": 2},
        {"allOf": [POINT, {"properties": {"y": {}}}]},
        {**POINT, "anyOf": [{"properties": {"y": {}}}, {"properties": {"z": {}}}]},
        {"$defs": {"p": POINT}, "$ref": "#/$defs/p", "properties": {"y": {}}},
        {"enum": [{"properties": {"x": 1}}]},
        {"const": {"properties": {}}},
        {"type": "object", "default": {"properties": {}}},
    ],
)
def test_a_schema_that_closing_could_contradict_stays_as_it_is(schema):
    assert prepared(schema) == {**schema, "x-guidance": dict(OPTIONS)}


def test_the_schema_given_is_left_alone():
    schema = {"type": "array", "items": copy.deepcopy(POINT)}

    prepared(schema)

    assert schema == {"type": "array", "items": POINT}


def test_depth_is_bounded():
    def nested(depth: int) -> dict:
        schema: dict = {}
        for _ in range(depth - 1):
            schema = {"items": schema}
        return schema

    prepared(nested(MAX_DEPTH))
    with pytest.raises(ValidationError, match="nested more than"):
        prepared(nested(MAX_DEPTH + 1))
