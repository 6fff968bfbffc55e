"""How bodies say what a text has to be: TGI's `grammar`, and OpenAI's `response_format` which takes the same and more.

Knows no automaton; whether a grammar is any good is found later.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from serving.api.schemas.strict import StrictModel
from serving.protocol import Grammar, GrammarKind

ANY_OBJECT = '{"type": "object"}'


class JsonGrammar(StrictModel):
    """JSON that is valid under a schema: an object, or the text of one."""

    type: Literal["json", "json_object"]
    value: Any
    _source: str = PrivateAttr("")

    def model_post_init(self, context: Any, /) -> None:
        """Write the schema out while a long body is read off the hub."""
        self._source = _text(self.value)

    def as_grammar(self) -> Grammar:
        """The same for the validator."""
        return Grammar(GrammarKind.JSON_SCHEMA, self._source)


class RegexGrammar(StrictModel):
    """A text that a regular expression matches from end to end."""

    type: Literal["regex"]
    value: str

    def as_grammar(self) -> Grammar:
        """The same for the validator."""
        return Grammar(GrammarKind.REGEX, self.value)


class NamedSchema(StrictModel):
    """A JSON schema with a name, which says nothing."""

    name: str | None = None
    json_schema: Any = Field(alias="schema")


class JsonSchemaGrammar(StrictModel):
    """JSON that is valid under a named schema."""

    type: Literal["json_schema"]
    value: NamedSchema
    _source: str = PrivateAttr("")

    def model_post_init(self, context: Any, /) -> None:
        """Write the schema out while a long body is read off the hub."""
        self._source = _text(self.value.json_schema)

    def as_grammar(self) -> Grammar:
        """The same for the validator."""
        return Grammar(GrammarKind.JSON_SCHEMA, self._source)


class TextFormat(StrictModel):
    """Any text."""

    type: Literal["text"]

    def as_grammar(self) -> None:
        """Nothing to hold the text to."""
        return


class JsonFormat(StrictModel):
    """JSON: any object, or what is valid under a schema."""

    type: Literal["json", "json_object"]
    value: Any = None
    _source: str = PrivateAttr("")

    def model_post_init(self, context: Any, /) -> None:
        """Write the schema out while a long body is read off the hub."""
        self._source = ANY_OBJECT if self.value is None else _text(self.value)

    def as_grammar(self) -> Grammar:
        """The same for the validator."""
        return Grammar(GrammarKind.JSON_SCHEMA, self._source)


class OpenAISchema(StrictModel):
    """A JSON schema as OpenAI's clients wrap it; it is always followed, `strict` or not."""

    name: str | None = None
    description: str | None = None
    json_schema: Any = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(StrictModel):
    """JSON that is valid under a schema: OpenAI's `json_schema`, or TGI's `value`."""

    type: Literal["json_schema"]
    json_schema: OpenAISchema | None = None
    value: NamedSchema | None = None
    _source: str = PrivateAttr("")

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.json_schema is None and self.value is None:
            raise ValueError("missing field `json_schema`")
        return self

    def model_post_init(self, context: Any, /) -> None:
        """Write the schema out while a long body is read off the hub."""
        named = self.json_schema or self.value
        schema = None if named is None else named.json_schema
        self._source = ANY_OBJECT if schema is None else _text(schema)

    def as_grammar(self) -> Grammar:
        """The same for the validator."""
        return Grammar(GrammarKind.JSON_SCHEMA, self._source)


TGIGrammar = Annotated[JsonGrammar | RegexGrammar | JsonSchemaGrammar, Field(discriminator="type")]
ResponseFormat = Annotated[TextFormat | JsonFormat | RegexGrammar | JsonSchemaFormat, Field(discriminator="type")]


def _text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
