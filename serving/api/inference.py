"""The way of every generation, whatever its dialect: validate, permit, submit, then collect or stream.

Knows no JSON and no header.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from serving.bridge import Bridge, Client, ResponseStream
from serving.errors import (
    ClientGone,
    IncompleteGeneration,
    IncompleteGenerationStream,
    Overloaded,
    RequestError,
    TemplateError,
    Unavailable,
    ValidationError,
)
from serving.protocol import Finish, OutputToken, Request, RequestOutput, TokenLogprob
from serving.telemetry.metrics import Metrics
from serving.validation.chat_template import Conversation
from serving.validation.validator import Parameters, Piece, Validated, Validator

LONG_TEXT = 4096  # characters, from which on tokenising would hold up the hub


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        connection: to be watched, for when it ends so does the request; `None` where there is none to watch.
        cache_salt: keeps the cached prefixes of one key's requests apart from another's.
        request_id: the client's name for the request, or ours.
    """

    connection: Client | None
    cache_salt: str
    request_id: str


@dataclass(kw_only=True, slots=True)
class Answer:
    """One whole generated text.

    Attributes:
        seed: None if its tokens were not drawn.
        prompt: the prompt's tokens, if their log probabilities were asked for.
    """

    seed: int | None
    finish: Finish
    prompt: list[TokenLogprob] = field(default_factory=list)
    tokens: list[OutputToken] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, the end-of-sequence token included."""
        return sum(token.logprob for token in self.tokens) / max(1, len(self.tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """How long a generation took, in seconds from its arrival."""

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    generated_tokens: int


class Generation:
    """The answers to one request, on their way. Closing it, for any reason, is the cancellation."""

    def __init__(
        self, streams: Sequence[ResponseStream], validated: Validated, metrics: Metrics, *, arrived: float
    ) -> None:
        self.validated = validated
        self._streams = streams
        self._metrics = metrics
        self._arrived = arrived
        self._validation_s = time.monotonic() - arrived
        self._finishes: list[Finish] = []
        self._answered = False

    def outputs(self) -> Iterator[tuple[int, RequestOutput] | None]:
        """Yield (which answer, its output), in turns; `None` when a keep-alive is due. To be used once.

        Raises:
            GenerationError: an answer had to be given up.
            IncompleteGenerationStream: an answer ended without a last token.
            ClientGone: the client closed its side.
        """
        failure = "dropped"
        try:
            for item in self._in_turns():
                if item is not None:
                    self._observe(item[1])
                yield item
        except ClientGone:
            raise
        except RequestError as error:
            failure = _failure(error)
            raise
        finally:
            self.close()
            if len(self._finishes) < len(self._streams):
                self._metrics.request_failed(failure)

    def collect(self) -> tuple[list[Answer], Timings]:
        """Wait for every answer to its end.

        Raises:
            GenerationError, ClientGone: as `outputs`.
            IncompleteGeneration: an answer ended without a last token.
        """
        parts: list[list[RequestOutput]] = [[] for _ in self._streams]
        try:
            for item in self.outputs():
                if item is not None:
                    index, output = item
                    parts[index].append(output)
        except IncompleteGenerationStream as error:
            raise IncompleteGeneration from error
        answers = [_answer(seed, outputs) for seed, outputs in zip(self.validated.seeds, parts, strict=True)]
        return answers, self._timings()

    def close(self) -> None:
        """Abort what is unfinished. Safe to call twice."""
        for stream in self._streams:
            stream.close()

    def _in_turns(self) -> Iterator[tuple[int, RequestOutput] | None]:
        running = {index: iter(stream) for index, stream in enumerate(self._streams)}
        while running:
            for index, outputs in list(running.items()):
                try:
                    output = next(outputs)
                except StopIteration:
                    raise IncompleteGenerationStream from None
                if output is None:
                    yield None
                    continue
                if output.finish is not None:
                    del running[index]
                yield index, output

    def _observe(self, output: RequestOutput) -> None:
        if output.tokens and not self._answered:
            self._answered = True
            self._metrics.first_token(time.monotonic() - self._arrived)
        if output.finish is None:
            return
        self._finishes.append(output.finish)
        if len(self._finishes) == len(self._streams):
            timings = self._timings()
            self._metrics.request_succeeded(
                total_s=timings.total_s,
                validation_s=timings.validation_s,
                queue_s=timings.queue_s,
                inference_s=timings.inference_s,
                generated_tokens=timings.generated_tokens,
            )

    def _timings(self) -> Timings:
        return Timings(
            total_s=time.monotonic() - self._arrived,
            validation_s=self._validation_s,
            queue_s=max(finish.queue_s for finish in self._finishes),
            inference_s=max(finish.inference_s for finish in self._finishes),
            generated_tokens=sum(finish.generated_tokens for finish in self._finishes),
        )


class Inference:
    """What the dialects share."""

    def __init__(self, bridge: Bridge[Validator], metrics: Metrics) -> None:
        self._bridge = bridge
        self._metrics = metrics

    def generate(self, text: str, parameters: Parameters, *, stream: bool, caller: Caller) -> Generation:
        """Begin to go on with `text`.

        Args:
            stream: whether the answer is given piece by piece.

        Raises:
            ValidationError: the request breaks a rule.
            Overloaded, NotReady, ShuttingDown: it cannot be taken now.
        """

        def validate(validator: Validator) -> Validated:
            if len(text) > LONG_TEXT:
                return self._bridge.offload(validator.validate, text, parameters)
            return validator.validate(text, parameters)

        return self._begin(validate, parameters, stream=stream, caller=caller)

    def chat(self, conversation: Conversation, parameters: Parameters, *, stream: bool, caller: Caller) -> Generation:
        """Begin to answer a conversation.

        Raises:
            TemplateError: the model's template is missing or refuses them.
            ValidationError, Overloaded, NotReady, ShuttingDown: as `generate`.
        """
        return self._begin(
            lambda validator: self._bridge.offload(validator.validate_chat, conversation, parameters),
            parameters,
            stream=stream,
            caller=caller,
        )

    def tokenize(self, text: str) -> list[Piece]:
        """The tokens of `text`. Raises NotReady, ShuttingDown."""
        tokenize = self._bridge.loaded().tokenize
        return self._bridge.offload(tokenize, text) if len(text) > LONG_TEXT else tokenize(text)

    def _begin(
        self,
        validate: Callable[[Validator], Validated],
        parameters: Parameters,
        *,
        stream: bool,
        caller: Caller,
    ) -> Generation:
        arrived = time.monotonic()
        validator = self._bridge.loaded()
        self._metrics.request_received()
        try:
            with ExitStack() as held:
                samples = validator.samples(parameters, stream=stream)
                permits = [held.enter_context(self._bridge.permit()) for _ in range(samples)]
                validated = validate(validator)
                self._metrics.request_validated(
                    input_length=validated.input_length,
                    max_new_tokens=validated.requests[0].stop.max_new_tokens,
                )
                submitted = ExitStack()
                with submitted:
                    streams = [
                        submitted.enter_context(
                            self._bridge.submit(_salted(request, caller), caller.connection, permit)
                        )
                        for request, permit in zip(validated.requests, permits, strict=True)
                    ]
                    submitted.pop_all()
        except RequestError as error:
            self._metrics.request_failed(_failure(error))
            raise
        return Generation(streams, validated, self._metrics, arrived=arrived)


def _salted(request: Request, caller: Caller) -> Request:
    return msgspec.structs.replace(request, cache_salt=caller.cache_salt) if caller.cache_salt else request


def _failure(error: RequestError) -> str:
    """TGI's word for a failure, in its metrics."""
    match error:
        case ValidationError():
            return "validation"
        case TemplateError():
            return "template"
        case Overloaded():
            return "overloaded"
        case IncompleteGenerationStream():
            return "incomplete"
        case Unavailable():
            return "unavailable"
    return "generation"


def _answer(seed: int | None, outputs: Sequence[RequestOutput]) -> Answer:
    finish = outputs[-1].finish
    if finish is None:
        raise IncompleteGeneration
    return Answer(
        seed=seed,
        finish=finish,
        prompt=outputs[0].prompt,
        tokens=[token for output in outputs for token in output.tokens],
    )
