"""OpenAI's chat: `/v1/chat/completions`.

Knows nothing of TGI's own dialect.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
from flask import Response
from msgspec import UNSET

from serving.api import errors, sse
from serving.api.body import load_as, read_body
from serving.api.caller import caller
from serving.api.generation import Answer, Generation
from serving.api.headers import stream_headers, timing_headers
from serving.api.identity import Identity
from serving.api.inference import Inference
from serving.api.models import Models
from serving.api.openai import FINISH_REASONS, logprobs_of, new_id, usage_of
from serving.api.schemas.chat import (
    AnswerMessage,
    CalledFunction,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    ToolCall,
)
from serving.api.schemas.openai import Usage, model_or
from serving.bridge import Bridge
from serving.protocol import Finish, FinishReason, RequestOutput
from serving.validation.chat_template import Conversation
from serving.validation.parameters import Parameters
from serving.validation.tool_calls import CallPiece, ToolCallParser
from serving.validation.tools import Demand, ToolUse
from serving.validation.validator import Validator

MakeChunk = Callable[[list[ChunkChoice], Usage | None], bytes]
MakeReader = Callable[[], "Reader"]


class Chat:
    """The handler of OpenAI's chat."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference, identity: Identity, models: Models) -> None:
        self._bridge = bridge
        self._inference = inference
        self._identity = identity
        self._models = models

    def completions(self) -> Response:
        """`POST /v1/chat/completions`."""
        return self.answer(read_body(self._bridge, load_as(ChatRequest)))

    def answer(self, asked: ChatRequest) -> Response:
        """What a chat is answered."""
        if not asked.stream:
            return self.begin_whole(asked)[1]()
        validator = self._bridge.loaded()
        compute_type = self._identity.compute_type_on(validator.facts)
        begun = self.begin(asked, stream=True)
        return self._streamed(asked, begun, _reader_maker(validator, begun.use), compute_type)

    def begin_whole(self, asked: ChatRequest) -> tuple[Generation, Callable[[], Response]]:
        """Begin what a chat is answered whole; the second waits for it."""
        validator = self._bridge.loaded()
        compute_type = self._identity.compute_type_on(validator.facts)
        begun = self.begin(asked, stream=False)
        reader = _reader_maker(validator, begun.use)
        return begun.generation, lambda: self._whole(asked, begun, reader, compute_type)

    def begin(self, asked: ChatRequest, *, stream: bool) -> "Begun":
        """Begin to answer a chat. Raises ModelNotFound, and what `Inference.chat` raises."""
        validator = self._bridge.loaded()
        who = caller()
        adapter = who.adapter or self._models.adapter_in(asked.model)

        def prepared() -> tuple[ToolUse | None, Parameters, Conversation]:
            use, parameters = asked.tool_use(), dataclasses.replace(asked.checked_later(), adapter_id=adapter)
            if use is not None:
                parameters = _with_tools(parameters, use, validator)
            return use, parameters, asked.conversation(validator.tool_syntax, use)

        use, parameters, conversation = self._bridge.offload(prepared)
        generation = self._inference.chat(conversation, parameters, stream=stream, caller=who)
        return Begun(generation, use, adapter or model_or(asked.model, self._identity.model_id))

    def _whole(self, asked: ChatRequest, begun: "Begun", reader: MakeReader, compute_type: str) -> Response:
        generation = begun.generation
        answers, timings = generation.collect()

        def choices() -> list[Choice]:
            return [
                _choice(index, answer, reader(), logprobs=bool(asked.logprobs)) for index, answer in enumerate(answers)
            ]

        told = sum(answer.told_tokens for answer in answers) if asked.logprobs else 0
        completion = ChatCompletion(
            id=new_id("chatcmpl"),
            created=int(time.time()),
            model=begun.model,
            system_fingerprint=self._identity.system_fingerprint,
            choices=self._bridge.offload(choices) if asked.tools else self._inference.write(choices, tokens=told),
            usage=usage_of(generation.validated.input_length, timings.generated_tokens),
        )
        return Response(
            msgspec.json.encode(completion),
            headers=timing_headers(compute_type, generation.validated, timings),
            content_type="application/json",
        )

    def _streamed(self, asked: ChatRequest, begun: "Begun", reader: MakeReader, compute_type: str) -> Response:
        name, created = new_id("chatcmpl"), int(time.time())
        generation = begun.generation

        def chunk(choices: list[ChunkChoice], usage: Usage | None) -> bytes:
            return sse.event(
                ChatCompletionChunk(
                    id=name,
                    created=created,
                    model=begun.model,
                    system_fingerprint=self._identity.system_fingerprint,
                    choices=choices,
                    usage=usage,
                )
            )

        frames = _frames(
            sse.begun(generation.outputs()),
            generation,
            reader,
            chunk,
            logprobs=bool(asked.logprobs),
            usage=asked.stream_options is not None and asked.stream_options.include_usage,
        )
        headers = stream_headers(compute_type, generation.validated.characters)
        return sse.response(sse.guarded(frames, errors.openai_body, farewell=sse.DONE), headers, generation.close)


class Begun(NamedTuple):
    """A chat on its way: its answers, the tools that the model may or must call, and the name that answers bear."""

    generation: Generation
    use: ToolUse | None
    model: str


class Reader:
    """Makes an assistant's message of one answer's text.

    Args:
        parser: finds the calls of tools; `None` where the model may call none.
    """

    def __init__(self, parser: ToolCallParser | None) -> None:
        self._parser = parser

    def whole(self, finish: Finish) -> AnswerMessage:
        """The message; one that only calls has no content."""
        if self._parser is None:
            return AnswerMessage("assistant", finish.text)
        content, calls = self._read(finish.text, last=True)
        if not calls:
            return AnswerMessage("assistant", content)
        return AnswerMessage("assistant", content or UNSET, [_tool_call(call) for call in calls])

    def delta(self, output: RequestOutput) -> AnswerMessage | None:
        """What is new of the message; `None` as long as that is undecided."""
        if self._parser is None:
            return AnswerMessage("assistant", output.text)
        content, calls = self._read(output.text, last=output.finish is not None)
        if not content and not calls and output.finish is None:
            return None
        return AnswerMessage("assistant", content or UNSET, [_tool_call_chunk(call) for call in calls] or UNSET)

    def finish_reason(self, finish: Finish) -> str:
        """OpenAI's word for the answer's end, once all of it is read."""
        parser = self._parser
        if parser is None or not parser.calls or parser.cut_off or finish.reason is FinishReason.LENGTH:
            return FINISH_REASONS[finish.reason]
        return "tool_calls"

    def _read(self, text: str, *, last: bool) -> tuple[str, Sequence[CallPiece]]:
        if self._parser is None:
            return text, ()
        said = self._parser.feed(text)
        return said.content + (self._parser.finish() if last else ""), said.calls


def _reader_maker(validator: Validator, use: ToolUse | None) -> MakeReader:
    return lambda: Reader(None if use is None else validator.tool_syntax.parser(use))


def _with_tools(parameters: Parameters, use: ToolUse, validator: Validator) -> Parameters:
    """The same for a model that has tools; without grammars it may still call them, but nothing can make it."""
    syntax = validator.tool_syntax
    held = validator.follows_grammars or use.demand is Demand.MUST
    return dataclasses.replace(
        parameters, grammar=syntax.grammar(use) if held else None, shown_token_ids=syntax.markers
    )


def _choice(index: int, answer: Answer, reader: Reader, *, logprobs: bool) -> Choice:
    return Choice(
        index=index,
        message=reader.whole(answer.finish),
        logprobs=logprobs_of(answer.tokens) if logprobs else None,
        finish_reason=reader.finish_reason(answer.finish),
    )


def _tool_call(call: CallPiece) -> ToolCall:
    return ToolCall(id=call.id or UNSET, type="function", function=CalledFunction(call.name or UNSET, call.arguments))


def _tool_call_chunk(call: CallPiece) -> ToolCall:
    function = CalledFunction(call.name or UNSET, call.arguments)
    if call.id is None:
        return ToolCall(index=call.index, function=function)
    return ToolCall(index=call.index, id=call.id, type="function", function=function)


def _frames(
    outputs: Iterator[tuple[int, RequestOutput] | None],
    generation: Generation,
    reader: MakeReader,
    chunk: MakeChunk,
    *,
    logprobs: bool,
    usage: bool,
) -> Iterator[bytes]:
    generated_tokens = 0
    readers: defaultdict[int, Reader] = defaultdict(reader)
    for item in outputs:
        if item is None:
            yield sse.KEEP_ALIVE
            continue
        index, output = item
        generated_tokens += len(output.tokens)
        delta = readers[index].delta(output)
        if delta is None and not logprobs:
            continue
        choice = ChunkChoice(
            index=index,
            delta=delta or AnswerMessage("assistant", UNSET),
            logprobs=logprobs_of(output.tokens) if logprobs else None,
            finish_reason=None if output.finish is None else readers[index].finish_reason(output.finish),
        )
        yield chunk([choice], None)
    if usage:
        yield chunk([], usage_of(generation.validated.input_length, generated_tokens))
    yield sse.DONE
