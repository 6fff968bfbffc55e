"""The model's chat template: messages to prompt text, with Hugging Face's semantics, in an immutable sandbox.

Knows no HTTP and no limit on tokens.
"""

import datetime
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from serving.errors import ModelError, TemplateError
from serving.tokenizer import Tokenizer

TIME_LIMIT_S = 2.0
MAX_CHARACTERS = 16_000_000
MAX_INTEGER_BITS = 1024
CLOCK = "render_clock"  # the name under which a render's clock stands among the template's variables
MARK = "\ue000continue\ue000"  # put behind a message to find its end again; content alone may occur later by chance
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat's next answer follows from.

    Attributes:
        messages: the turns so far; a `content` is a text or a list of parts.
        tools: the functions that the model may call, as templates know them; `None` where there are none.
        template_kwargs: further variables for the template, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class _Clock:
    """The bounds of one render."""

    def __init__(self, time_limit_s: float, max_characters: int) -> None:
        self._deadline = time.monotonic() + time_limit_s
        self.max_characters = max_characters

    def check(self) -> None:
        if time.monotonic() > self._deadline:
            raise jinja2.exceptions.SecurityError("the template takes too long")

    def measure(self, value: Any) -> Any:
        """Return `value` unless it is too large to go on with."""
        if isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise jinja2.exceptions.SecurityError("the template computes too large a number")
        elif isinstance(value, str | bytes | list | tuple | dict) and len(value) > self.max_characters:
            raise jinja2.exceptions.SecurityError("the template makes too long a text")
        return value


@jinja2.pass_context
def _metered(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, with a look at the clock before each."""
    clock = context[CLOCK]
    for item in items:
        clock.check()
        yield item


@jinja2.pass_context
def _measured(context: jinja2.runtime.Context, value: Any) -> Any:
    return context[CLOCK].measure(value)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - as the parent has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which every loop and call looks at the clock and every value kept is measured."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would compute before any clock runs
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        self.filters["tojson"] = _tojson
        self.filters["metered"] = _metered
        self.filters["measured"] = _measured
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def compile_bounded(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "metered")
        for kept in tree.find_all(jinja2.nodes.Assign):
            kept.node = _filtered(kept.node, "measured")
        for block in tree.find_all(jinja2.nodes.AssignBlock):
            block.filter = _filtered(block.filter, "measured")
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - jinja2's own
        clock = __context[CLOCK]
        clock.check()
        return clock.measure(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse a product or power whose result would not fit, before it is computed."""
        limit = context[CLOCK].max_characters
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if (
                    isinstance(repeated, str | list | tuple)
                    and isinstance(times, int)
                    and len(repeated) * times > limit
                ):
                    raise jinja2.exceptions.SecurityError("the template makes too long a text")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_INTEGER_BITS:
            raise jinja2.exceptions.SecurityError("the template computes too large a number")
        return context[CLOCK].measure(super().call_binop(context, operator, left, right))


def _filtered(node: jinja2.nodes.Node | None, name: str) -> jinja2.nodes.Filter:
    """The filter over a node; without a node, over the text of the block that it stands at."""
    return jinja2.nodes.Filter(node, name, [], [], None, None)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter: jinja2's own would escape `<`, `>`, `&` and `'` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - the templates' own word
    return datetime.datetime.now().strftime(format)


class ChatTemplate:
    """A compiled chat template; rendering is safe in several threads at a time.

    A template is a part of the model that the operator chose; the bounds keep a bad one from holding a thread or
    filling the memory.

    Args:
        special_tokens: variables such as `bos_token` that the template may use.
        time_limit_s: after which a render fails.
        max_characters: of the rendered text, and of every value on the way.

    Raises:
        ModelError: the template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        time_limit_s: float = TIME_LIMIT_S,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._time_limit_s = time_limit_s
        self._max_characters = max_characters
        try:
            self._template = _Environment().compile_bounded(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, config_path: Path | None = None) -> "ChatTemplate | None":
        """The template that stands in a model's directory, or `None`.

        `chat_template.jinja` comes before `chat_template.json`, and both before the tokenizer's configuration.

        Args:
            config_path: a tokenizer_config.json that the operator wants the template to come from instead.

        Raises:
            ModelError: there is one, and it cannot be read or compiled.
        """
        source = _source(directory, tokenizer.config) if config_path is None else _read_template(config_path)
        if source is None:
            return None
        named = {name: _token_text(tokenizer.config.get(name)) for name in SPECIAL_TOKENS}
        named["bos_token"] = tokenizer.bos_token or named["bos_token"]
        named["eos_token"] = tokenizer.eos_token or named["eos_token"]
        return cls(source, {name: text for name, text in named.items() if text is not None})

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for an answer to `messages`, whose content is a text.

        A last message of the assistant is continued: the prompt ends with its content, white space cut off.

        Raises:
            TemplateError: the template refuses the messages, fails, or passes its bounds.
        """
        if not messages or messages[-1].get("role") != "assistant":
            return self._render(messages, add_generation_prompt=True)
        *before, last = messages
        marked = {**last, "content": f"{last.get('content') or ''}{MARK}"}
        rendered = self._render([*before, marked], add_generation_prompt=False)
        continued, mark, _ = rendered.rpartition(MARK)
        return continued.rstrip() if mark else rendered

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        clock = _Clock(self._time_limit_s, self._max_characters)
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            CLOCK: clock,
        }
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(variables):
                clock.check()
                length += len(piece)
                if length > self._max_characters:
                    raise jinja2.exceptions.SecurityError("the template makes too long a text")
                pieces.append(piece)
        except jinja2.TemplateError as error:
            raise TemplateError(error.message or type(error).__name__) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TemplateError(f"the template fails on these messages: {error}"[:1000]) from error
        return "".join(pieces)


def _source(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = directory / name
        if path.is_file():
            return _read_template(path)
    return _default_template(tokenizer_config)


def _read_template(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
        return text if path.suffix == ".jinja" else _default_template(json.loads(text))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error


def _default_template(config: Any) -> str | None:
    """The template in a configuration: a string, or of a list of named ones the one named "default"."""
    template = config.get("chat_template") if isinstance(config, Mapping) else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
