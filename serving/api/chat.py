"""OpenAI's chat: `/v1/chat/completions`.

Knows nothing of TGI's own dialect.
"""

import time
from collections.abc import Callable, Iterator

import msgspec
from flask import Response

from serving.api import errors, sse
from serving.api.body import load_as, read_body
from serving.api.caller import caller
from serving.api.headers import stream_headers, timing_headers
from serving.api.identity import Identity
from serving.api.inference import Generation, Inference
from serving.api.openai import FINISH_REASONS, logprobs_of, new_id, usage_of
from serving.api.schemas.chat import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
)
from serving.api.schemas.openai import Usage, model_or
from serving.bridge import Bridge
from serving.errors import RequestError, ToolError
from serving.protocol import RequestOutput
from serving.validation.chat_template import Conversation
from serving.validation.validator import Validator

MakeChunk = Callable[[list[ChunkChoice], Usage | None], bytes]


class Chat:
    """The handler of OpenAI's chat."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference, identity: Identity) -> None:
        self._bridge = bridge
        self._inference = inference
        self._identity = identity

    def completions(self) -> Response:
        """`POST /v1/chat/completions`."""
        return self.answer(read_body(self._bridge, load_as(ChatRequest)))

    def answer(self, asked: ChatRequest) -> Response:
        """What a chat is answered."""
        try:
            if asked.tools:
                raise ToolError("tools are not supported yet")
            compute_type = self._identity.compute_type_on(self._bridge.loaded().facts)
            generation = self._inference.chat(
                Conversation(messages=[message.for_template() for message in asked.messages]),
                asked.checked_later(),
                stream=asked.stream,
                caller=caller(),
            )
            if asked.stream:
                return self._streamed(asked, generation, compute_type)
            return self._whole(asked, generation, compute_type)
        except RequestError as error:
            return errors.answer(error, errors.openai_body)

    def _whole(self, asked: ChatRequest, generation: Generation, compute_type: str) -> Response:
        answers, timings = generation.collect()
        completion = ChatCompletion(
            id=new_id("chatcmpl"),
            created=int(time.time()),
            model=model_or(asked.model, self._identity.model_id),
            system_fingerprint=self._identity.system_fingerprint,
            choices=[
                Choice(
                    index=index,
                    message=AnswerMessage(role="assistant", content=answer.finish.text),
                    logprobs=logprobs_of(answer.tokens) if asked.logprobs else None,
                    finish_reason=FINISH_REASONS[answer.finish.reason],
                )
                for index, answer in enumerate(answers)
            ],
            usage=usage_of(generation.validated.input_length, timings.generated_tokens),
        )
        return Response(
            msgspec.json.encode(completion),
            headers=timing_headers(compute_type, generation.validated, timings),
            content_type="application/json",
        )

    def _streamed(self, asked: ChatRequest, generation: Generation, compute_type: str) -> Response:
        name, created = new_id("chatcmpl"), int(time.time())
        model = model_or(asked.model, self._identity.model_id)

        def chunk(choices: list[ChunkChoice], usage: Usage | None) -> bytes:
            return sse.event(
                ChatCompletionChunk(
                    id=name,
                    created=created,
                    model=model,
                    system_fingerprint=self._identity.system_fingerprint,
                    choices=choices,
                    usage=usage,
                )
            )

        frames = _frames(
            sse.begun(generation.outputs()),
            generation,
            chunk,
            logprobs=bool(asked.logprobs),
            usage=asked.stream_options is not None and asked.stream_options.include_usage,
        )
        headers = stream_headers(compute_type, generation.validated.characters)
        return sse.response(sse.guarded(frames, errors.openai_body, farewell=sse.DONE), headers, generation.close)


def _frames(
    outputs: Iterator[tuple[int, RequestOutput] | None],
    generation: Generation,
    chunk: MakeChunk,
    *,
    logprobs: bool,
    usage: bool,
) -> Iterator[bytes]:
    generated_tokens = 0
    for item in outputs:
        if item is None:
            yield sse.KEEP_ALIVE
            continue
        index, output = item
        generated_tokens += len(output.tokens)
        choice = ChunkChoice(
            index=index,
            delta=AnswerMessage(role="assistant", content=output.text),
            logprobs=logprobs_of(output.tokens) if logprobs else None,
            finish_reason=None if output.finish is None else FINISH_REASONS[output.finish.reason],
        )
        yield chunk([choice], None)
    if usage:
        yield chunk([], usage_of(generation.validated.input_length, generated_tokens))
    yield sse.DONE
