"""One training example: a raw continuation or a conversation, which is never cut in two.

It must not know how text becomes tokens.
"""

from dataclasses import dataclass, field
from typing import Any

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """A prompt without any template and the text that follows it directly."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A conversation in the shape of the chat API: messages, and the tools offered with them."""

    messages: tuple[JsonObject, ...]
    tools: tuple[JsonObject, ...] = field(default=())


Document = Raw | Chat


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, not yet dressed as a raw text or as a conversation."""

    question: str
    answer: str
