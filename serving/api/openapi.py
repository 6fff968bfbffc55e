"""The API's own description, OpenAPI 3.1, made of the routes' operations and of the schemas that the routes use.

Knows no route and no field by itself.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, get_args

import msgspec
import msgspec.structs
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from serving import __version__
from serving.api import errors
from serving.api.body import TYPE_PREFIX
from serving.api.fields import RULES, meaning_of
from serving.api.operations import JSON, OPERATIONS, PLAIN_TEXT, TAGS, TIMINGS, Operation
from serving.errors import RequestError, Unavailable

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/"
DESCRIPTION = """\
Text generation with TGI's API and OpenAI's. Fields that a route does not know are ignored.

An answer that is cut because its time was over (`--response-deadline`, `--stream-deadline`) ends as one that reached \
its length; if it is whole, it has the header `x-response-cut: deadline`.

If the server was started with `--api-key`, every route but `GET` and `HEAD` of `/`, `/health` and `/ping` asks for it \
as `Authorization: Bearer <key>`; these pages do too.\
"""
REFUSALS = {
    HTTPStatus.BAD_REQUEST: "The body is no JSON.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is longer than `--payload-limit`.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not said to be JSON.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "The body is JSON of another shape.",
}
LIST_BOUNDS = ("minItems", "maxItems")
NUMBER_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class _Titleless(GenerateJsonSchema):
    """Fields have names already."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Schemas:
    """The components, and references to them for the types that the operations name."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        models = {model for operation in operations for model in operation.takes}
        given = {name: kind for operation in operations for name, kind in _answers(operation)}
        _, bodies = models_json_schema(
            [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
            ref_template=REFERENCE + "{model}",
            schema_generator=_Titleless,
        )
        names, kinds = list(given), list(given.values())
        schemas, structs = msgspec.json.schema_components(kinds, ref_template=REFERENCE + "{name}")
        self._answers = dict(zip(names, map(_renamed, schemas), strict=True))
        for struct in _structs(kinds):
            _allow_absence(struct, structs)
        requested = {name: _explained(name, schema) for name, schema in bodies["$defs"].items()}
        answered = {_short(name): _renamed(schema) for name, schema in structs.items()}
        if doubled := requested.keys() & answered.keys():
            raise ValueError(f"two schemas have one name: {sorted(doubled)}")
        self.components = dict(sorted((requested | answered).items()))

    def of(self, kinds: Iterable[Any]) -> Schema:
        """Any of the types."""
        return _any_of([self._answers[repr(kind)] for kind in kinds])


def document() -> Schema:
    """The whole description; the same for every server of this version."""
    schemas = _Schemas(OPERATIONS)
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Weir",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "What `--api-key` was given."}
            },
        },
    }


def _operation(operation: Operation, schemas: _Schemas) -> Schema:
    described: Schema = {
        "tags": [operation.tag],
        "operationId": operation.name,
        "summary": operation.summary,
        "security": [] if operation.public else [{}, {"key": []}],
    }
    if operation.words:
        described["description"] = operation.words
    if "{" in operation.path:
        described["parameters"] = [_path_parameter(operation)]
    if operation.takes:
        described["requestBody"] = {
            "required": True,
            "content": {
                JSON: {
                    "schema": _any_of([{"$ref": REFERENCE + model.__name__} for model in operation.takes]),
                    "examples": {name: {"value": value} for name, value in operation.examples.items()},
                }
            },
        }
    described["responses"] = {
        str(int(status)): response for status, response in sorted(_responses(operation, schemas).items())
    }
    return described


def _path_parameter(operation: Operation) -> Schema:
    name = operation.path.partition("{")[2].partition("}")[0]
    schema: Schema = {"type": "string", **({"enum": list(operation.named)} if operation.named else {})}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _responses(operation: Operation, schemas: _Schemas) -> dict[HTTPStatus, Schema]:
    answers = _success(operation, schemas)
    fails: tuple[type[RequestError], ...] = operation.fails
    if not operation.public:
        fails = (errors.Unauthorized, *fails)
    for error in fails:
        status = errors.STATUSES[error.error_type]
        answer = answers.setdefault(
            status, {"description": "", "content": {JSON: {"schema": _failure(operation, schemas)}}}
        )
        answer["description"] = " ".join(filter(None, [answer["description"], _first_line(error)]))
        if issubclass(error, Unavailable):
            answer["headers"] = {"retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
        if error is errors.Unauthorized:
            answer["headers"] = {"www-authenticate": {"schema": {"const": "Bearer"}}}
    if operation.takes:
        for status, words in REFUSALS.items():
            answer = answers.setdefault(status, {"description": "", "content": {}})
            answer["description"] = " ".join(filter(None, [answer["description"], words]))
            answer["content"][PLAIN_TEXT] = {"schema": {"type": "string"}}
            if status is HTTPStatus.UNPROCESSABLE_ENTITY:
                answer["content"][PLAIN_TEXT]["example"] = f"{TYPE_PREFIX}missing field `inputs`"
    if operation.named:
        answers[HTTPStatus.NOT_FOUND] = {"description": "There is no such file."}
    return answers


def _success(operation: Operation, schemas: _Schemas) -> dict[HTTPStatus, Schema]:
    if operation.moved:
        return {HTTPStatus.SEE_OTHER: _moved(operation)}
    return {HTTPStatus.OK: _ok(operation, schemas)}


def _ok(operation: Operation, schemas: _Schemas) -> Schema:
    content: Schema = {}
    if operation.gives:
        content[JSON] = {"schema": schemas.of(operation.gives)}
    if operation.streams:
        content["text/event-stream"] = {"schema": _event(operation, schemas)}
    if operation.content:
        content[operation.content] = {"schema": {"type": "string"}}
    answer: Schema = {"description": "The answer."}
    if operation.streams:
        answer["description"] = (
            "The answer; as a stream its events come while it is made."
            if operation.gives
            else ("The answer, in events that come while it is made.")
        )
    if operation.timed:
        answer["headers"] = {
            name: {
                "description": f"{words} Not on streams." if operation.streams else words,
                "schema": {"type": "string"},
            }
            for name, words in TIMINGS.items()
        }
    if content:
        answer["content"] = content
    return answer


def _moved(operation: Operation) -> Schema:
    return {
        "description": "The page is there.",
        "headers": {"location": {"schema": {"const": operation.moved}}},
    }


def _event(operation: Operation, schemas: _Schemas) -> Schema:
    """One event; what stands behind `data:` is JSON, but for the last one on OpenAI's routes."""
    failure = _failure(operation, schemas)
    shape = _any_of([schemas.of(operation.streams), failure])
    payload: Schema = {"type": "string", "contentMediaType": JSON, "contentSchema": shape}
    last: Schema = {"const": "[DONE]", "description": "The end."}
    return {
        "type": "object",
        "description": "An event: `data: `, and JSON.",
        "properties": {"data": {"anyOf": [last, payload]} if operation.done else payload},
        "required": ["data"],
    }


def _failure(operation: Operation, schemas: _Schemas) -> Schema:
    return schemas.of([_body_of(dialect) for dialect in operation.dialects])


def _answers(operation: Operation) -> Iterable[tuple[str, Any]]:
    """Everything that an operation can send as JSON."""
    bodies = [_body_of(dialect) for dialect in operation.dialects]
    return [(repr(kind), kind) for kind in (*operation.gives, *operation.streams, *bodies)]


def _body_of(dialect: errors.Dialect) -> type[errors.Body]:
    """The shape of a dialect's errors, taken from one of them."""
    return type(dialect(errors.Internal()))


def _first_line(error: type[RequestError]) -> str:
    return (error.__doc__ or "").partition("\n")[0]


def _explained(model: str, schema: Schema) -> Schema:
    """A request's schema with what its fields mean and the bounds that the validator holds them to."""
    for name, described in schema.get("properties", {}).items():
        meaning = meaning_of(model, name)
        if meaning is None:
            continue
        described.setdefault("description", meaning.words)
        if meaning.bounds:
            _narrow(described, meaning.bounds)
    return {**schema, **RULES.get(model, {})}


def _narrow(schema: Schema, bounds: Mapping[str, Any]) -> None:
    """Bounds of numbers go to the numbers among what a field can be, those of lists to the lists."""
    for branch in [schema, *schema.get("anyOf", [])]:
        kinds = {"array": LIST_BOUNDS, "number": NUMBER_BOUNDS, "integer": NUMBER_BOUNDS}.get(branch.get("type"), ())
        fitting = {keyword: bound for keyword, bound in bounds.items() if keyword in kinds}
        if "exclusiveMinimum" in fitting:
            branch.pop("minimum", None)
        if "maximum" in fitting:
            branch.pop("exclusiveMaximum", None)
        branch.update(fitting)


def _structs(kinds: Iterable[Any]) -> set[type[msgspec.Struct]]:
    """Every struct in the types, and in those structs' fields."""
    found: set[type[msgspec.Struct]] = set()
    left = list(kinds)
    while left:
        kind = left.pop()
        left += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in found:
            found.add(kind)
            left += [each.type for each in msgspec.structs.fields(kind)]
    return found


def _allow_absence(struct: type[msgspec.Struct], schemas: Schema) -> None:
    """Fields that may be `UNSET` may be absent, whether or not that is their default."""
    schema = schemas.get(struct.__name__) or schemas[f"{struct.__module__}.{struct.__qualname__}"]
    absent = {each.encode_name for each in msgspec.structs.fields(struct) if msgspec.UnsetType in get_args(each.type)}
    if absent:
        schema["required"] = [name for name in schema.get("required", []) if name not in absent]


def _any_of(schemas: list[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _short(name: str) -> str:
    """A component's name: of two structs with one name, each has its module's before it."""
    if "." not in name:
        return name
    *_, module, struct = name.split(".")
    return f"{module.capitalize().replace('Openai', 'OpenAI')}{struct}"


def _renamed(value: Any) -> Any:
    """The same with every reference by the short name, and without titles that say the name again."""
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(item) for key, item in value.items() if not (key == "title" and isinstance(item, str))}
    if isinstance(reference := value.get("$ref"), str):
        renamed["$ref"] = REFERENCE + _short(reference.removeprefix(REFERENCE))
    return renamed
