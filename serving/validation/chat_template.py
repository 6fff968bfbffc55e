"""The model's chat template: a conversation to prompt text, with Hugging Face's semantics.

Knows no HTTP and no limit on tokens; what a template may do is the sandbox's matter.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from serving.errors import ConfigurationError, ModelError, TemplateError, ValidationError
from serving.tokenizer import Tokenizer
from serving.validation.render_meter import Meter
from serving.validation.sandbox import Sandbox

TIME_LIMIT_S = 2.0
PROBE_TIME_LIMIT_S = 1.0
MAX_CHARACTERS = 8_000_000
MAX_DETAIL = 1000  # characters of an error's words that are the template's own
MARK = "\ue000continue\ue000"  # put behind a message to find its end again; content alone may occur later by chance
PROBE = "\ue000probe\ue000"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the preferred one first
DEFAULT, TOOL_USE = "default", "tool_use"  # of the templates that have names, those that are ever taken

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat's next answer follows from.

    Attributes:
        messages: the turns so far; a `content` is a text or a list of parts.
        tools: the functions that the model may call, as templates know them; `None` where there are none.
        template_kwargs: further variables for the template, such as `enable_thinking`; those that it does not read are
            left out. `messages`, `tools` and the special tokens cannot be set. `add_generation_prompt` and
            `continue_final_message` are booleans; without them, a last message of the assistant's is continued, and
            after any other the assistant's turn begins.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class _Content(enum.Enum):
    """What a template takes for a message's content."""

    TEXT = enum.auto()
    PARTS = enum.auto()
    EITHER = enum.auto()


@dataclass(frozen=True, slots=True)
class _Ending:
    """How the prompt ends: with the assistant's turn begun, the last message left open, or neither.

    Attributes:
        told: whether the client said that the last message is to be continued.
    """

    begins_turn: bool
    continues: bool
    told: bool = False


class _Program:
    """One compiled template with what it takes for content, which is found out by trying."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], time_limit_s: float, max_characters: int
    ) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._time_limit_s = time_limit_s
        self._max_characters = max_characters
        sandbox = Sandbox(max_characters)
        try:
            self._template = sandbox.compile_bounded(source)
            self._variables = jinja2.meta.find_undeclared_variables(sandbox.parse(source))
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise ModelError(f"the chat template cannot be compiled: {str(error)[:MAX_DETAIL]}") from error
        self._sandbox = sandbox
        self._content = self._probed()

    def mentions(self, variable: str) -> bool:
        return variable in self._variables

    def content_of(self, role: Any) -> _Content:
        """What it takes as content of this role's messages; an unknown role's is a text wherever the user's can be."""
        known = self._content.get(role) if isinstance(role, str) else None
        if known is not None:
            return known
        return _Content.PARTS if self._content["user"] is _Content.PARTS else _Content.TEXT

    def run(self, variables: Mapping[str, Any], time_limit_s: float | None = None) -> str:
        """Render; raises TemplateError."""
        meter = Meter(time_limit_s or self._time_limit_s, self._max_characters)
        pieces: list[str] = []
        length = 0
        try:
            with self._sandbox.metered(meter):
                for piece in self._template.generate({"documents": None, **self._special_tokens, **variables}):
                    meter.tick()
                    length += len(piece)
                    meter.room(length)
                    pieces.append(piece)
        except jinja2.TemplateError as error:
            raise TemplateError(str(error.message or type(error).__name__)[:MAX_DETAIL]) from error
        except Exception as error:  # what a template computes may fail in any way that Python can
            raise TemplateError(f"the template fails on these messages: {error}"[:MAX_DETAIL]) from error
        return "".join(pieces)

    def _probed(self) -> dict[str, _Content]:
        """What it takes, per role: a reader of the source would miss macros, aliases and tests of the type."""
        question = {"role": "user", "content": "q"}
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        found: dict[str, _Content] = {}
        for role, before, after in (
            ("user", [], []),
            ("system", [], [question]),
            ("assistant", [question], [question]),
            ("tool", [question, calls], []),
        ):
            probe = {"role": role, **({"tool_call_id": call["id"], "name": "f"} if role == "tool" else {})}
            text = self._probe([*before, {**probe, "content": PROBE}, *after])
            parts = self._probe([*before, {**probe, "content": [{"type": "text", "text": PROBE}]}, *after])
            if role == "user" and text is None and parts is None:
                break  # it may be hostile; one more try for each role would only take time
            found[role] = _verdict(text, parts)
        return {"user": _Content.TEXT, **found}

    def _probe(self, messages: list[Message]) -> str | None:
        variables = {"messages": messages, "tools": None, "add_generation_prompt": False}
        try:
            rendered = self.run(variables, min(PROBE_TIME_LIMIT_S, self._time_limit_s))
        except TemplateError:
            return None
        return rendered if PROBE in rendered else None


def _verdict(text: str | None, parts: str | None) -> _Content:
    if parts is None:
        return _Content.TEXT
    if text is None:
        return _Content.PARTS
    shows_structure = parts.count("type") > text.count("type")
    return _Content.TEXT if shows_structure else _Content.EITHER


class ChatTemplate:
    """A model's compiled chat template; rendering is safe in several threads at a time.

    A template is a part of the model that the operator chose; the bounds keep a bad one from holding a thread or
    filling the memory.

    Args:
        source: renders chats.
        special_tokens: variables such as `bos_token` that the template may use.
        tool_source: renders chats with tools instead, where the model has such a template.
        time_limit_s: after which a render fails.
        max_characters: of the rendered text, and of every value on the way.

    Raises:
        ModelError: a template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        tool_source: str | None = None,
        time_limit_s: float = TIME_LIMIT_S,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._plain = _Program(source, self._special_tokens, time_limit_s, max_characters)
        self._tooled = (
            self._plain
            if tool_source is None
            else _Program(tool_source, self._special_tokens, time_limit_s, max_characters)
        )

    @classmethod
    def load(
        cls, directory: Path, tokenizer: Tokenizer, config_path: Path | None = None, override: str | None = None
    ) -> "ChatTemplate | None":
        """The template that stands in a model's directory, or `None`.

        `chat_template.jinja`, with named ones in `additional_chat_templates/`, comes before `chat_template.json`, that
        before the tokenizer's configuration, and that before the processor's. Of templates with names, `tool_use`
        renders chats with tools, and `default` all others.

        Args:
            config_path: a tokenizer_config.json that the operator wants the template and its tokens to come from.
            override: the operator's own template, before all others: its text, or the path of a file that holds one.
                A text without `{` would always say the same, so that it is taken for a path.

        Raises:
            ModelError: there is one, and it cannot be read or compiled.
            ConfigurationError: the operator's own cannot be read.
        """
        config = dict(tokenizer.config)
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        if config_path is not None:
            given = _read_json(config_path)
            tokens |= {name: text for name in SPECIAL_TOKENS if (text := _token_text(given.get(name))) is not None}
        if override is not None:
            named = _overriding(override)
        else:
            named = _found(directory, config) if config_path is None else _named(_read_template(config_path))
        source = named.get(DEFAULT, named.get(TOOL_USE))
        if source is None:
            return None
        special = {**_special_tokens(config), **{name: text for name, text in tokens.items() if text is not None}}
        return cls(source, special, tool_source=named.get(TOOL_USE))

    @property
    def source(self) -> str:
        """The template's text; of several, the one for chats with tools."""
        return self._tooled.source

    def mentions(self, variable: str) -> bool:
        """Whether the template reads a variable such as `tools`; of several, the one for chats with tools."""
        return self._tooled.mentions(variable)

    def render(self, conversation: Conversation) -> str:
        """The prompt for an answer to a conversation; content is text only.

        As transformers does, keys without a value are left out, a message's reasoning stands under each name that
        templates read, and the arguments of calls are objects, also where the client wrote them as JSON. Parts are
        joined for templates that take texts, and a text is made a part for those that take parts. When the last
        message is continued, the prompt ends with its content, without trailing white space if the template cuts that.

        Raises:
            TemplateError: the template refuses the conversation, fails, or passes its bounds.
            ValidationError: `template_kwargs` sets what it cannot set.
        """
        kwargs = {**conversation.template_kwargs}
        ending = _ending(conversation.messages, kwargs)
        for name in kwargs:
            if name in ("messages", "tools", "chat_template", *SPECIAL_TOKENS, *self._special_tokens):
                raise ValidationError(f"`chat_template_kwargs` must not set `{name}`")
        program = self._plain if conversation.tools is None else self._tooled
        messages = [_prepared(message, program.content_of(message.get("role"))) for message in conversation.messages]
        if ending.continues:
            messages[-1] = _marked(messages[-1])
        rendered = program.run(
            {
                **{name: value for name, value in kwargs.items() if program.mentions(name)},
                "messages": messages,
                "tools": None if conversation.tools is None else list(conversation.tools),
                "add_generation_prompt": ending.begins_turn,
            }
        )
        return _cut(rendered, ending) if ending.continues else rendered


def _ending(messages: Sequence[Message], kwargs: dict[str, Any]) -> _Ending:
    """How the prompt is to end; what says so is taken out of `kwargs`."""
    begins_turn, continues = kwargs.pop("add_generation_prompt", None), kwargs.pop("continue_final_message", None)
    for name, value in (("add_generation_prompt", begins_turn), ("continue_final_message", continues)):
        if not isinstance(value, bool | None):
            raise ValidationError(f"`{name}` in `chat_template_kwargs` must be a boolean")
    if continues and begins_turn:
        raise ValidationError("`add_generation_prompt` and `continue_final_message` exclude each other")
    if continues:
        if not messages or messages[-1].get("content") is None:
            raise ValidationError("`continue_final_message` needs a last message with content")
        return _Ending(begins_turn=False, continues=True, told=True)
    if continues is None and not begins_turn and messages:
        last = messages[-1]
        if last.get("role") == "assistant" and not last.get("tool_calls"):
            return _Ending(begins_turn=False, continues=True)
    return _Ending(begins_turn=begins_turn is not False, continues=False)


def _prepared(message: Message, takes: _Content) -> Message:
    prepared = {name: value for name, value in message.items() if value is not None}
    content = prepared.get("content")
    if isinstance(content, list) and takes is _Content.TEXT:
        prepared["content"] = "".join(part["text"] for part in content)
    elif isinstance(content, str) and takes is _Content.PARTS:
        prepared["content"] = [{"type": "text", "text": content}]
    calls = prepared.get("tool_calls")
    if isinstance(calls, list):
        prepared["tool_calls"] = [_with_object(call) for call in calls]
    reasoning = next((prepared[name] for name in REASONING if name in prepared), None)
    return prepared if reasoning is None else {"thinking": reasoning, **prepared, "reasoning_content": reasoning}


def _with_object(call: Any) -> Any:
    """The call of a tool with its arguments as an object, where they can be read as one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if function is None or not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": read}} if isinstance(read, dict) else call


def _marked(message: Message) -> Message:
    """The message with the mark at the end of its text, and a space by which one sees whether ends are cut."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": f"{content}{MARK} "}
    last = len(content) - 1
    return {
        **message,
        "content": [
            {**part, "text": f"{part['text']}{MARK} "} if index == last else part for index, part in enumerate(content)
        ],
    }


def _cut(rendered: str, ending: _Ending) -> str:
    """The prompt up to the mark.

    Raises:
        TemplateError: there is no mark, and the client said that the message is to be continued.
    """
    continued, mark, rest = rendered.rpartition(MARK)
    if not mark:
        if ending.told:
            raise TemplateError("the template hides the end of the last message, which cannot be continued")
        return rendered
    return continued if rest.startswith(" ") else continued.rstrip()


def _found(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a model by name."""
    files = {path.stem: _read_template(path) for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    named = {name: text for name, text in files.items() if isinstance(text, str)}
    for name in ("chat_template.jinja", "chat_template.json"):
        path = directory / name
        if path.is_file():
            return {**_named(_read_template(path)), **named}
    processor = directory / "processor_config.json"
    own = _named(config.get("chat_template")) or (_named(_read_template(processor)) if processor.is_file() else {})
    return {**own, **named}


def _overriding(override: str) -> dict[str, str]:
    if "{" in override:
        return {DEFAULT: override}
    try:
        named = _named(_read_template(Path(override)))
    except ModelError as error:
        raise ConfigurationError(f"`chat_template` is neither a template nor the path of one: {error}") from error
    if not named:
        raise ConfigurationError(f"`chat_template`: there is no template in {override}")
    return named


def _read_template(path: Path) -> Any:
    """The text of a file, or what a JSON file has for `chat_template`."""
    if path.suffix == ".json":
        return _read_json(path).get("chat_template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    return content if isinstance(content, Mapping) else {}


def _named(template: Any) -> dict[str, str]:
    """Templates by name from a configuration's value: one text, a list of named ones, or an object of them."""
    if isinstance(template, str):
        return {DEFAULT: template}
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if not isinstance(template, Mapping):
        return {}
    return {name: text for name, text in template.items() if isinstance(name, str) and isinstance(text, str)}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a tokenizer's configuration names, those of one model alone among them."""
    more = config.get("extra_special_tokens")
    named = {**(more if isinstance(more, Mapping) else {}), **{name: config.get(name) for name in SPECIAL_TOKENS}}
    return {name: text for name, token in named.items() if (text := _token_text(token)) is not None}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
