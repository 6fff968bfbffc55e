"""TGI's own dialect: `/`, `/generate` and `/generate_stream`.

Knows nothing of OpenAI's.
"""

import dataclasses
from collections.abc import Callable, Iterator

import msgspec
from flask import Response, request
from msgspec import UNSET

from serving.api import sse
from serving.api.body import load_as, read_body
from serving.api.caller import caller
from serving.api.errors import native_body
from serving.api.generation import Answer, Generation
from serving.api.headers import stream_headers, timing_headers
from serving.api.identity import Identity
from serving.api.inference import Inference
from serving.api.schemas.native import (
    BestOfSequence,
    CompatGenerateRequest,
    Details,
    GenerateRequest,
    GenerateResponse,
    StreamDetails,
    StreamResponse,
    Token,
    prefill_token,
    token,
)
from serving.bridge import Bridge
from serving.errors import IncompleteGenerationStream, NotReady, RequestError, ShuttingDown
from serving.protocol import Finish, OutputToken, RequestOutput
from serving.validation.validator import Validator

# Of a hub's models; None: of a directory's. The compatible routes then put the prompt before the answer.
FULL_TEXT_PIPELINES = (None, "text-generation")
NO_TOKEN = OutputToken(id=0, text="", logprob=0.0, special=True)  # clients leave special tokens out of the text
STRICT_STATUS = "x-strict-status"  # a request header: `true` gives streams that fail at once a real status


class Native:
    """The handlers of the native routes."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference, identity: Identity) -> None:
        self._bridge = bridge
        self._inference = inference
        self._identity = identity

    def generate(self) -> Response:
        """`POST /generate`."""
        return self._whole(read_body(self._bridge, load_as(GenerateRequest)), full_text=False, listed=False)

    def generate_stream(self) -> Response:
        """`POST /generate_stream`."""
        return self._streamed(read_body(self._bridge, load_as(GenerateRequest)), full_text=False)

    def generate_either(self) -> Response:
        """`POST /`."""
        return self.answer(read_body(self._bridge, load_as(CompatGenerateRequest)))

    def answer(self, asked: CompatGenerateRequest) -> Response:
        """What `POST /` answers to a body."""
        full_text = self._returns_full_text()
        if asked.stream:
            return self._streamed(asked, full_text=full_text)
        return self._whole(asked, full_text=full_text, listed=True)

    def begin_whole(self, asked: CompatGenerateRequest) -> tuple[Generation, Callable[[], Response]]:
        """Begin what `POST /` answers whole; the second waits for it."""
        return self._begin(asked, full_text=self._returns_full_text(), listed=True)

    def _returns_full_text(self) -> bool:
        return self._bridge.loaded().origin.pipeline_tag in FULL_TEXT_PIPELINES

    def _whole(self, asked: GenerateRequest, *, full_text: bool, listed: bool) -> Response:
        _, finish = self._begin(asked, full_text=full_text, listed=listed)
        return finish()

    def _begin(
        self, asked: GenerateRequest, *, full_text: bool, listed: bool
    ) -> tuple[Generation, Callable[[], Response]]:
        compute_type = self._compute_type()
        generation = self._inference.generate(
            asked.inputs,
            asked.parameters.checked_later(),
            stream=False,
            caller=caller(),
        )

        def finish() -> Response:
            return self._collected(asked, generation, compute_type, full_text=full_text, listed=listed)

        return generation, finish

    def _collected(
        self, asked: GenerateRequest, generation: Generation, compute_type: str, *, full_text: bool, listed: bool
    ) -> Response:
        answers, timings = generation.collect()
        best, *others = sorted(answers, key=lambda answer: answer.mean_logprob, reverse=True)
        prefix = self._prefix(asked, full_text)
        wanted = asked.parameters.details or asked.parameters.decoder_input_details

        def details() -> Details:
            return _details(best, others, prefix, top=bool(asked.parameters.top_n_tokens))

        told = sum(answer.told_tokens for answer in answers)
        whole = GenerateResponse(
            generated_text=prefix + best.finish.text,
            details=self._inference.write(details, tokens=told) if wanted else UNSET,
        )
        timings = dataclasses.replace(timings, generated_tokens=best.finish.generated_tokens)
        return Response(
            msgspec.json.encode([whole] if listed else whole),
            headers=timing_headers(compute_type, generation.validated, timings),
            content_type="application/json",
        )

    def _streamed(self, asked: GenerateRequest, *, full_text: bool) -> Response:
        strict = request.headers.get(STRICT_STATUS, "").strip().lower() == "true"
        headers = stream_headers(self._compute_type(), len(asked.inputs))
        try:
            generation = self._inference.generate(
                asked.inputs,
                asked.parameters.checked_later(),
                stream=True,
                caller=caller(),
            )
        except (NotReady, ShuttingDown):
            raise
        except RequestError as error:
            if strict:
                raise
            return sse.response([sse.event(native_body(error))], headers)
        outputs = sse.begun(generation.outputs()) if strict else generation.outputs()
        prefix = self._prefix(asked, full_text)
        frames = sse.guarded(_frames(outputs, generation, prefix, details=asked.parameters.details), native_body)
        return sse.response(frames, headers, generation.close)

    def _compute_type(self) -> str:
        return self._identity.compute_type_on(self._bridge.loaded().facts)

    @staticmethod
    def _prefix(asked: GenerateRequest, full_text: bool) -> str:
        said = asked.parameters.return_full_text
        return asked.inputs if (full_text if said is None else said) else ""


def _details(best: Answer, others: list[Answer], prefix: str, *, top: bool) -> Details:
    return Details(
        finish_reason=best.finish.reason,
        generated_tokens=best.finish.generated_tokens,
        seed=best.seed,
        prefill=[prefill_token(known) for known in best.prompt],
        tokens=[token(generated) for generated in best.tokens],
        best_of_sequences=[_best_of_sequence(other, prefix, top=top) for other in others] if others else UNSET,
        top_tokens=_top_tokens(best.tokens) if top else UNSET,
    )


def _best_of_sequence(answer: Answer, prefix: str, *, top: bool) -> BestOfSequence:
    return BestOfSequence(
        generated_text=prefix + answer.finish.text,
        finish_reason=answer.finish.reason,
        generated_tokens=answer.finish.generated_tokens,
        seed=answer.seed,
        prefill=[prefill_token(known) for known in answer.prompt],
        tokens=[token(generated) for generated in answer.tokens],
        top_tokens=_top_tokens(answer.tokens) if top else UNSET,
    )


def _top_tokens(tokens: list[OutputToken]) -> list[list[Token]]:
    return [[token(alternative) for alternative in generated.top] for generated in tokens]


def _frames(
    outputs: Iterator[tuple[int, RequestOutput] | None], generation: Generation, prefix: str, *, details: bool
) -> Iterator[bytes]:
    index = 0
    for item in outputs:
        if item is None:
            yield sse.KEEP_ALIVE
            continue
        _, output = item
        if output.finish is not None and not output.tokens:  # cut between tokens: an event needs one
            output = msgspec.structs.replace(output, tokens=[NO_TOKEN])
        if not output.tokens:
            raise IncompleteGenerationStream
        finishes: list[Finish | None] = [None] * len(output.tokens)
        finishes[-1] = output.finish
        events = []
        for generated, finish in zip(output.tokens, finishes, strict=True):
            index += 1
            events.append(sse.event(_event(index, generated, finish, generation, prefix, details=details)))
        yield b"".join(events)


def _event(
    index: int, generated: OutputToken, finish: Finish | None, generation: Generation, prefix: str, *, details: bool
) -> StreamResponse:
    last_details = None
    if finish is not None and details:
        last_details = StreamDetails(
            finish_reason=finish.reason,
            generated_tokens=finish.generated_tokens,
            seed=generation.validated.seeds[0],
            input_length=generation.validated.input_length,
        )
    return StreamResponse(
        index=index,
        token=token(generated),
        top_tokens=[token(alternative) for alternative in generated.top] or UNSET,
        generated_text=None if finish is None else prefix + finish.text,
        details=last_details,
    )
