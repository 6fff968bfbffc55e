"""The bodies of `/v1/chat/completions`, as TGI and OpenAI read and write them, in the order of their keys.

Knows no rule on values: those are the validator's.
"""

from typing import Annotated, Any, Literal, Self

from msgspec import Struct
from pydantic import Field, model_validator

from serving.api.schemas.openai import Logprobs, ResponseFormat, StreamOptions, Usage
from serving.api.schemas.strict import F32, U32, U64, Array, StrictModel
from serving.protocol import Grammar, GrammarKind
from serving.validation.chat_template import Message
from serving.validation.validator import Parameters


class TextPart(StrictModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    """Where an image is."""

    url: str


class ImagePart(StrictModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(StrictModel):
    """One turn of a conversation: with content, or with calls of tools."""

    role: str
    content: str | Array[Part] | None = None
    name: str | None = None
    tool_calls: Array[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message needs `content` or `tool_calls`")
        return self

    def for_template(self) -> Message:
        """The message as templates know it: keys that were not given are absent, and content is never null."""
        message = self.model_dump(exclude_none=True)
        message.setdefault("content", "")
        return message


class ChatRequest(StrictModel):
    """The body of `/v1/chat/completions`."""

    messages: Array[ChatMessage]
    model: str | None = None
    max_tokens: U32 | None = None
    max_completion_tokens: U32 | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    stop: str | Array[str] | None = None
    seed: U64 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: Array[dict[str, Any]] | None = None
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, F32] | Array[F32] | None = None
    n: U32 | None = None
    min_p: F32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Array[U32] | None = None
    include_stop_str_in_output: bool | None = None

    def checked_later(self) -> Parameters:
        """The same for the validator. Tokens are drawn unless the temperature is 0; TGI's list of biases is void."""
        greedy = self.temperature == 0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Parameters(
            n=self.n,
            do_sample=not greedy,
            temperature=None if greedy else self.temperature,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias if isinstance(self.logit_bias, dict) else {},
            top_p=None if greedy else self.top_p,
            min_p=None if greedy else self.min_p,
            max_new_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=stop,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            keep_stop_text=bool(self.include_stop_str_in_output),
            seed=self.seed,
            top_n_tokens=self.top_logprobs,
            grammar=None
            if self.response_format is None or self.response_format.type == "text"
            else Grammar(GrammarKind.JSON_SCHEMA, ""),
        )


class AnswerMessage(Struct, frozen=True):
    """What the assistant says, or adds in a stream."""

    role: str
    content: str


class Choice(Struct, frozen=True):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """The answer to a chat."""

    object: str = "chat.completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(Struct, frozen=True):
    """What is new of one of the answers."""

    index: int
    delta: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Struct, frozen=True, kw_only=True):
    """An event of a streamed chat."""

    object: str = "chat.completion.chunk"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None
