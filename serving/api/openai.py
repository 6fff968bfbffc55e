"""OpenAI's dialect: `/v1/chat/completions`.

Knows nothing of TGI's own.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType

import msgspec
from flask import Response, request

from serving.api import errors, sse
from serving.api.body import load_as, read_body
from serving.api.headers import stream_headers, timing_headers
from serving.api.identity import Identity
from serving.api.inference import Generation, Inference
from serving.api.schemas.float32 import shortest
from serving.api.schemas.openai import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Logprobs,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from serving.bridge import Bridge
from serving.errors import RequestError, ToolError
from serving.protocol import FinishReason, OutputToken, RequestOutput
from serving.validation.validator import Validator

FINISH_REASONS = MappingProxyType(
    {FinishReason.LENGTH: "length", FinishReason.EOS_TOKEN: "stop", FinishReason.STOP_SEQUENCE: "stop"}
)

MakeChunk = Callable[[list[ChunkChoice], Usage | None], bytes]


class OpenAI:
    """The handlers of OpenAI's routes."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference, identity: Identity) -> None:
        self._bridge = bridge
        self._inference = inference
        self._identity = identity

    def chat(self) -> Response:
        """`POST /v1/chat/completions`."""
        return self.answer_chat(read_body(self._bridge, load_as(ChatRequest)))

    def answer_chat(self, asked: ChatRequest) -> Response:
        """What a chat is answered."""
        try:
            if asked.tools:
                raise ToolError("tools are not supported yet")
            compute_type = self._identity.compute_type_on(self._bridge.loaded().facts)
            generation = self._inference.chat(
                [message.for_template() for message in asked.messages],
                asked.checked_later(),
                stream=asked.stream,
                client=request.environ.get("gunicorn.socket"),
            )
            if asked.stream:
                return self._streamed(asked, generation, compute_type)
            return self._whole(asked, generation, compute_type)
        except RequestError as error:
            return errors.answer(error, errors.openai_body)

    def _whole(self, asked: ChatRequest, generation: Generation, compute_type: str) -> Response:
        answers, timings = generation.collect()
        completion = ChatCompletion(
            id=_new_id(),
            created=int(time.time()),
            model=asked.model_or(self._identity.model_id),
            system_fingerprint=self._identity.system_fingerprint,
            choices=[
                Choice(
                    index=index,
                    message=AnswerMessage(role="assistant", content=answer.finish.text),
                    logprobs=_logprobs(answer.tokens) if asked.logprobs else None,
                    finish_reason=FINISH_REASONS[answer.finish.reason],
                )
                for index, answer in enumerate(answers)
            ],
            usage=_usage(generation, timings.generated_tokens),
        )
        return Response(
            msgspec.json.encode(completion),
            headers=timing_headers(compute_type, generation.validated, timings),
            content_type="application/json",
        )

    def _streamed(self, asked: ChatRequest, generation: Generation, compute_type: str) -> Response:
        new_id, created = _new_id(), int(time.time())
        model = asked.model_or(self._identity.model_id)

        def chunk(choices: list[ChunkChoice], usage: Usage | None) -> bytes:
            return sse.event(
                ChatCompletionChunk(
                    id=new_id,
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
            logprobs=_logprobs(output.tokens) if logprobs else None,
            finish_reason=None if output.finish is None else FINISH_REASONS[output.finish.reason],
        )
        yield chunk([choice], None)
    if usage:
        yield chunk([], _usage(generation, generated_tokens))
    yield sse.DONE


def _logprobs(tokens: Sequence[OutputToken]) -> Logprobs:
    return Logprobs(
        content=[
            TokenLogprobs(
                token=token.text,
                logprob=shortest(token.logprob),
                top_logprobs=[TopLogprob(top.text, shortest(top.logprob)) for top in token.top],
            )
            for token in tokens
        ]
    )


def _usage(generation: Generation, completion_tokens: int) -> Usage:
    prompt_tokens = generation.validated.input_length
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
