"""Calls of tools in an answer, read as it grows.

Knows no token and no grammar; what a call looks like is the format's to say.
"""

import enum
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from serving.validation.tools import ToolFormat, ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """What is new of one call.

    Attributes:
        index: which call of the answer it is.
        id, name: with a call's first piece, otherwise `None`.
        arguments: the next piece of the arguments' JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What is new of an answer: text for the user, and pieces of calls, one for each call at most."""

    content: str = ""
    calls: Sequence[CallPiece] = ()


class _State(enum.Enum):
    TEXT = enum.auto()
    HEAD = enum.auto()
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()
    OVER = enum.auto()


class ToolCallParser:
    """Reads one answer as it grows. In whatever pieces a text comes, it says the same.

    Text that may still become a call is held back, blanks before a call included; blanks around calls are left out.
    Only a call of a function that was offered is a call; anything else is text, as it stands.

    Attributes:
        calls: how many calls have begun.
        cut_off: whether the text ended within the arguments of a call.
    """

    def __init__(self, tool_format: ToolFormat, use: ToolUse) -> None:
        self._format = tool_format
        self._several = use.several
        self._heads = {tool.name: tuple(piece.strip() for piece in tool_format.head_of(tool)) for tool in use.tools}
        self._state = _State.TEXT if tool_format.opening else _State.HEAD
        self._opening = tool_format.opening  # what to look for in text; "" for nothing
        self._text = ""  # not read yet
        self._held = ""  # what stands before `_text` and is content if no call follows
        self._in_block = False  # whether the head to come follows another call of its block
        self._after_call = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.calls = 0
        self.cut_off = False

    def feed(self, text: str) -> Said:
        """Read on."""
        self._text += text
        content: list[str] = []
        pieces: list[CallPiece] = []
        while self._step(content, pieces):
            pass
        return Said(content="".join(content), calls=_merged(pieces))

    def finish(self) -> str:
        """The content that was held back: no text follows that could make it a call."""
        rest = ""
        if self._state is _State.TEXT or (self._state is _State.HEAD and not self._in_block):
            rest = self._held + self._text
            if self._after_call and not rest.strip():
                rest = ""
        self.cut_off = self._state is _State.ARGUMENTS
        self._state = _State.OVER
        return rest

    def _step(self, content: list[str], pieces: list[CallPiece]) -> bool:
        """Take one step; whether another one may be possible without further text."""
        match self._state:
            case _State.TEXT:
                return self._read_text(content)
            case _State.HEAD:
                return self._read_head(content, pieces)
            case _State.ARGUMENTS:
                return self._read_arguments(pieces)
            case _State.TAIL:
                return self._read_tail()
        self._text = ""
        return False

    def _read_text(self, content: list[str]) -> bool:
        if self._after_call:
            self._text = self._text.lstrip()
            if not self._text:
                return False
        if not self._opening:
            content.append(self._text)
            self._text = ""
            self._after_call = False
            return False
        at = self._text.find(self._opening)
        found = at >= 0
        if not found:
            at = len(self._text) - _overhang(self._text, self._opening)
        certain = len(self._text[:at].rstrip())
        if certain:
            content.append(self._text[:certain])
            self._after_call = False
        self._text, blanks = self._text[certain:], at - certain
        if found:
            cut = blanks + len(self._opening)
            self._held, self._text = self._text[:cut], self._text[cut:]
            self._in_block = False
            self._state = _State.HEAD
        return found

    def _read_head(self, content: list[str], pieces: list[CallPiece]) -> bool:
        lead = () if self._in_block else (self._format.lead.strip(),)
        undecided = False
        for name, head in self._heads.items():
            end = _match(self._text, (*lead, *head), before="{")
            if end is None:
                undecided = True
            elif end >= 0:
                self._begin(name, pieces)
                self._text = self._text[end:]
                return True
        if undecided:
            return False
        self._state = _State.TEXT
        if self._in_block:
            return True
        held = self._held
        blanks = len(held) - len(self._opening)
        content.append(held[: blanks + 1])  # the rest of it may hold the beginning of another opening
        self._text, self._held = held[blanks + 1 :] + self._text, ""
        self._after_call = False
        return True

    def _begin(self, name: str, pieces: list[CallPiece]) -> None:
        pieces.append(CallPiece(index=self.calls, id=f"call_{secrets.token_hex(12)}", name=name))
        self.calls += 1
        self._held = ""
        self._depth = 0
        self._state = _State.ARGUMENTS

    def _read_arguments(self, pieces: list[CallPiece]) -> bool:
        end = self._object_end()
        read = self._text if end is None else self._text[:end]
        self._text = self._text[len(read) :]
        if read:
            pieces.append(CallPiece(index=self.calls - 1, arguments=read))
        if end is None:
            return False
        self._state = _State.TAIL
        return True

    def _object_end(self) -> int | None:
        """Where in the text the arguments end."""
        for at, letter in enumerate(self._text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter == "{":
                self._depth += 1
            elif letter == "}":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None

    def _read_tail(self) -> bool:
        """Leave a call: for the next one of its block, or for the text behind it, whatever that is."""
        words = self._format
        ways: list[tuple[tuple[str, ...], _State]] = [((words.tail, words.trail.strip(), words.closing), _State.TEXT)]
        if words.separator:
            ways.append(((words.tail, words.separator.strip()), _State.HEAD))
        ends = [_match(self._text, pieces) for pieces, _ in ways]
        for end, (_, state) in zip(ends, ways, strict=True):
            if end is not None and end >= 0:
                self._text = self._text[end:]
                self._leave(state)
                return True
        if None in ends:
            return False
        self._leave(_State.TEXT)
        return True

    def _leave(self, state: _State) -> None:
        self._state = state if self._several else _State.OVER
        self._in_block = state is _State.HEAD
        self._after_call = True


def _match(text: str, pieces: Sequence[str], *, before: str = "") -> int | None:
    """Where the pieces end, with which the text begins; blanks may stand before each.

    Args:
        before: what has to follow them.

    Returns:
        -1 if the text begins otherwise, `None` if that depends on what follows.
    """
    at = 0
    for piece in pieces:
        if piece:
            at += len(text) - at - len(text[at:].lstrip())
            if not text.startswith(piece, at):
                return None if piece.startswith(text[at:]) else -1
            at += len(piece)
    if before:
        at += len(text) - at - len(text[at:].lstrip())
        if not text.startswith(before, at):
            return None if before.startswith(text[at:]) else -1
    return at


def _overhang(text: str, opening: str) -> int:
    """How many characters at the end of `text` are the beginning of `opening`."""
    longest = min(len(text), len(opening) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(opening[:length])), 0)


def _merged(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    """One piece for each call."""
    merged: dict[int, CallPiece] = {}
    for piece in pieces:
        first = merged.get(piece.index)
        if first is not None:
            piece = CallPiece(
                index=piece.index, id=first.id, name=first.name, arguments=first.arguments + piece.arguments
            )
        merged[piece.index] = piece
    return list(merged.values())
