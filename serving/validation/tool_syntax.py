"""How one model reads and writes about tools: its family's format in its own tokens, told, enforced and read.

Knows no HTTP, no template's language and no automaton: a grammar leaves as text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.protocol import Grammar, GrammarKind
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate, Conversation, Message
from serving.validation.tool_calls import ToolCallParser
from serving.validation.tools import JSON, NAME, Demand, Tool, ToolFormat, ToolUse, format_of

DEFAULT_PROMPT = (
    "\nAnswer with a call of the function above that fits best: a JSON object of the form "
    "{name: the function's name, parameters: an object with its arguments}. Use values, no variables.\n"
)


class ToolSyntax:
    """How one model reads and writes about tools: its family's format, in its own tokens.

    Args:
        in_template: whether the model's chat template knows tools.

    Attributes:
        markers: special tokens that belong to a call, so that a text without them could not be read.
    """

    def __init__(self, tool_format: ToolFormat, tokenizer: Tokenizer, *, in_template: bool) -> None:
        self.format = tool_format
        self._in_template = in_template
        pieces = (tool_format.opening, *tool_format.head, tool_format.closing)
        ids = {piece: tokenizer.token_id(piece) for piece in pieces if piece}
        self._ids = {piece: token_id for piece, token_id in ids.items() if token_id in tokenizer.added_ids}
        self._other_ids = sorted(tokenizer.added_ids - {self._ids.get(tool_format.opening)})
        self.markers = tuple(token_id for token_id in self._ids.values() if tokenizer.is_special(token_id))

    @classmethod
    def of(cls, template: ChatTemplate | None, tokenizer: Tokenizer) -> "ToolSyntax":
        """The syntax of a model with this chat template."""
        if template is None:
            return cls(JSON, tokenizer, in_template=False)
        return cls(format_of(template.source), tokenizer, in_template=template.mentions("tools"))

    def conversation(
        self,
        messages: Sequence[Message],
        use: ToolUse | None,
        prompt: str | None,
        template_kwargs: Mapping[str, Any],
    ) -> Conversation:
        """A conversation in which the model is told of its tools: by its template, or else in the last message.

        Args:
            prompt: the client's own words on how to call a function, added to the last message.
        """
        length = self.format.id_length
        turns = [_with_short_ids(message, length) if length else message for message in messages]
        tools = None if use is None else [tool.for_template() for tool in use.tools]
        if tools is not None and turns:
            if not self._in_template:
                listed = json.dumps(tools, ensure_ascii=False, separators=(",", ":"))
                turns[-1] = _appended(turns[-1], f"\n---\n{listed}\n{DEFAULT_PROMPT if prompt is None else prompt}")
            elif prompt is not None:
                turns[-1] = _appended(turns[-1], f"\n---\n{prompt}")
        return Conversation(messages=turns, tools=tools, template_kwargs=template_kwargs)

    def grammar(self, use: ToolUse) -> Grammar:
        """What an answer has to be, as a grammar for llguidance.

        Where the model must call, it is calls and nothing else. Where it may, it is any text; but what begins like
        a call has to be one.
        """
        rules = self._calls(use) if use.demand is Demand.MUST else self._text_or_calls(use)
        return Grammar(GrammarKind.LARK, "\n".join([*rules, *self._block(use), ""]))

    def parser(self, use: ToolUse) -> ToolCallParser:
        """A reader of one answer."""
        return ToolCallParser(self.format, use)

    def _calls(self, use: ToolUse) -> list[str]:
        more = ' ("\\n"? block)*' if use.several and self.format.repeats else ""
        return [f"start: block{more}", *self._opening(self._marker(self.format.opening))]

    def _text_or_calls(self, use: ToolUse) -> list[str]:
        # A token that was added to the vocabulary is no text to llguidance, whatever its letters are.
        other = f"<[{_ranges(self._other_ids)}]>" if self._other_ids else ""
        text = "TEXT: /(?s:.+)/"
        opening = self.format.opening
        if opening:
            start = "(text? block)* text?" if use.several and self.format.repeats else "text? block?"
            marker = self._ids.get(opening)
            return [
                f"start: {start}",
                f"text: (TEXT | {other})+" if other else "text: TEXT",
                text,
                *self._opening("trigger" if marker is None else f"<[{marker}]> | trigger"),
                f"trigger[lazy]: TEXT? {_literal(opening)}",
            ]
        head = self.format.head
        named = next(at for at, piece in enumerate(head) if NAME in piece)
        names = " | ".join(_literal(self.format.head_of(tool)[named]) for tool in use.tools)
        blank = "/[ \\t\\r\\n]*/"
        begun = " ".join(f"{blank} {_literal(piece.strip())}" for piece in head[:named])
        return [
            f"start: ({other})* (block | FIRST (({other})+ TEXT?)*)?" if other else "start: (block | FIRST)?",
            "FIRST: /(?s:.+)/ & ~CALL",
            f"CALL: {begun} {blank} ({names}) /(?s:.*)/",
            *([text] if other else []),
        ]

    def _opening(self, rule: str) -> list[str]:
        return [f"opening: {rule}"] if self.format.opening else []

    def _block(self, use: ToolUse) -> list[str]:
        words = self.format
        more = f" ({_literal(words.separator)} call)*" if use.several and words.separator else ""
        parts = [
            "opening" if words.opening else "",
            '" "?' if words.lead.strip() else "",  # SentencePiece writes a blank between a token and a text
            _literal(words.lead),
            f"call{more}",
            _literal(words.trail),
            self._marker(words.closing),
        ]
        calls = " | ".join(f"call_{number}" for number in range(len(use.tools)))
        rules = [f"block: {' '.join(part for part in parts if part)}", f"call: {calls}"]
        for number, tool in enumerate(use.tools):
            schema = json.dumps(tool.arguments_schema(), ensure_ascii=False)
            rules.append(f"call_{number}: {self._head(tool)} %json {schema} {_literal(words.tail)}")
        return rules

    def _head(self, tool: Tool) -> str:
        """The head with as few literals as there can be: a shorter one would end where a longer text may go on."""
        parts, plain = [], ""
        for piece in self.format.head_of(tool):
            if piece in self._ids:
                parts += [_literal(plain), self._marker(piece)]
                plain = ""
            else:
                plain += piece
        return " ".join(part for part in (*parts, _literal(plain)) if part)

    def _marker(self, text: str) -> str:
        """A marker as its own token or in letters."""
        marker = self._ids.get(text)
        return _literal(text) if marker is None else f"(<[{marker}]> | {_literal(text)})"


def _ranges(ids: Sequence[int]) -> str:
    """Ascending ids, as llguidance lists them."""
    spans: list[list[int]] = []
    for token_id in ids:
        if spans and spans[-1][1] == token_id - 1:
            spans[-1][1] = token_id
        else:
            spans.append([token_id, token_id])
    return ",".join(f"{first}-{last}" for first, last in spans)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _with_short_ids(message: Message, length: int) -> Message:
    """The message with the ids of calls cut to what the template takes."""
    short = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        short["tool_call_id"] = message["tool_call_id"][-length:]
    if isinstance(message.get("tool_calls"), list):
        short["tool_calls"] = [
            {**call, "id": call["id"][-length:]} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return short


def _appended(message: Message, text: str) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": text}]}
    return {**message, "content": f"{content or ''}{text}"}
