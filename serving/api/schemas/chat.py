"""The bodies of `/v1/chat/completions`, as TGI and OpenAI read and write them, in the order of their keys.

Knows no rule on values: those are the validator's.
"""

from typing import Annotated, Any, Literal, Self

from msgspec import UNSET, Struct, UnsetType
from pydantic import Field, model_validator

from serving.api.schemas.grammar import ResponseFormat
from serving.api.schemas.openai import Logprobs, StreamOptions, Usage
from serving.api.schemas.strict import F32, U32, U64, Array, StrictModel
from serving.errors import ToolError
from serving.validation.chat_template import Conversation, Message
from serving.validation.parameters import Parameters
from serving.validation.tool_syntax import ToolSyntax
from serving.validation.tools import Tool, ToolUse, chosen, named


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
    reasoning_content: str | None = None
    reasoning: str | None = None

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


class FunctionDefinition(StrictModel):
    """A function that the model may call. `arguments` is TGI's word for `parameters`."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(StrictModel):
    """A tool; there are functions only."""

    type: str = "function"
    function: FunctionDefinition

    def as_tool(self) -> Tool:
        """The function, with no parameters if none were given."""
        given = self.function
        parameters = given.arguments if given.parameters is None else given.parameters
        return Tool(
            name=given.name,
            description=given.description,
            parameters={"type": "object", "properties": {}} if parameters is None else parameters,
            strict=bool(given.strict),
        )


class FunctionName(StrictModel):
    """Which function."""

    name: str


class NamedTool(StrictModel):
    """The tool that has to be called."""

    type: str = "function"
    function: FunctionName


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
    tools: Array[ToolDefinition] | None = None
    tool_choice: str | NamedTool | None = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, F32] | Array[F32] | None = None
    n: U32 | None = None
    min_p: F32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Array[U32] | None = None
    include_stop_str_in_output: bool | None = None

    def tool_use(self) -> ToolUse | None:
        """Which functions the model may or must call, if any.

        Raises:
            ToolError: the choice names a function that is not there, or the answer's form is prescribed besides.
        """
        tools = [tool.as_tool() for tool in self.tools or ()]
        if tools and self.response_format is not None and self.response_format.as_grammar() is not None:
            raise ToolError("Grammar and tools are mutually exclusive")
        if tools and isinstance(self.tool_choice, NamedTool):
            return named(tools, self.tool_choice.function.name)
        choice = None if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        return chosen(tools, choice, parallel=self.parallel_tool_calls is not False)

    def conversation(self, syntax: ToolSyntax, use: ToolUse | None) -> Conversation:
        """What the answer follows from; `use` is what `tool_use` says."""
        messages = [message.for_template() for message in self.messages]
        return syntax.conversation(messages, use, self.tool_prompt, self.chat_template_kwargs or {})

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
            grammar=None if self.response_format is None else self.response_format.as_grammar(),
        )


class CalledFunction(Struct, frozen=True):
    """A function that the model calls; of a stream's chunks only the first has its name."""

    name: str | UnsetType
    arguments: str


class ToolCall(Struct, frozen=True, kw_only=True):
    """A call, or in a stream what is new of it: there it has an index, and an id and a type with the first chunk."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: CalledFunction


class AnswerMessage(Struct, frozen=True):
    """What the assistant says, or adds in a stream."""

    role: str
    content: str | UnsetType
    tool_calls: list[ToolCall] | UnsetType = UNSET


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
