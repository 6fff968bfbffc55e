"""The answers to one request: collected whole or streamed, counted, and what their failures are called.

Knows no JSON, no header and no way in which they were asked for.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serving.bridge import ResponseStream
from serving.errors import (
    ClientGone,
    GenerationError,
    IncompleteGeneration,
    IncompleteGenerationStream,
    Overloaded,
    RequestError,
    SuffixNotSupported,
    TemplateError,
    TooManyPrompts,
    Unavailable,
    ValidationError,
)
from serving.protocol import Finish, OutputToken, RequestOutput, TokenLogprob
from serving.telemetry.journal import GenerationRecord
from serving.telemetry.metrics import Metrics
from serving.validation.validator import Validated, joined


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
    def told_tokens(self) -> int:
        """How many tokens it tells of, alternatives included."""
        return len(self.prompt) + sum(1 + len(token.top) for token in self.tokens)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, the end-of-sequence token included; an answer without any is the least likely."""
        return sum(token.logprob for token in self.tokens) / len(self.tokens) if self.tokens else -math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """How long a generation took, in seconds from its arrival.

    Attributes:
        cut: the request's deadline ended an answer.
    """

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    generated_tokens: int
    cut: bool = False


class Generation:
    """The answers to one request, on their way. Closing it, for any reason, is the cancellation.

    Attributes:
        prompts: what they are answers to; each prompt's answers stand behind those of the one before.
        validated: all of it as if it were one prompt.
    """

    def __init__(
        self, stream: ResponseStream, prompts: Sequence[Validated], metrics: Metrics, record: GenerationRecord
    ) -> None:
        self.prompts = prompts
        self.validated = joined(prompts)
        self._stream = stream
        self._metrics = metrics
        self._record = record
        self._arrived = record.arrived
        self._validation_s = time.monotonic() - record.arrived
        self._finishes: list[Finish] = []
        self._answered = False

    def outputs(self) -> Iterator[tuple[int, RequestOutput] | None]:
        """Yield (which answer, its output), as they come; `None` when a keep-alive is due. To be used once.

        Raises:
            GenerationError: an answer had to be given up, or none had a token at its deadline.
            IncompleteGenerationStream: an answer ended without a last token.
            ClientGone: the client closed its side.
        """
        failure = "dropped"
        try:
            places = {number: index for index, number in enumerate(self._stream.numbers)}
            for output in self._stream:
                if output is None:
                    yield None
                    continue
                index = places[output.request_id]
                if self._came_to_nothing(output):
                    raise GenerationError("there was no token yet when the time that an answer may take was over")
                self._observe(index, output)
                yield index, output
            if not self._complete:
                raise IncompleteGenerationStream
        except ClientGone:
            raise
        except RequestError as error:
            failure = failure_of(error)
            raise
        finally:
            self._end(failure)

    def collect(self) -> tuple[list[Answer], Timings]:
        """Wait for every answer to its end.

        Raises:
            GenerationError, ClientGone: as `outputs`.
            IncompleteGeneration: an answer ended without a last token.
        """
        parts: list[list[RequestOutput]] = [[] for _ in self._stream.numbers]
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
        """Abort what is unfinished; the client dropped it. Safe to call twice."""
        self._end("dropped")

    def _end(self, failure: str) -> None:
        self._stream.close()
        if not self._complete and self._record.error is None:
            self._record.error = failure
            self._metrics.request_failed(failure)

    @property
    def _complete(self) -> bool:
        return len(self._finishes) == len(self._stream.numbers)

    def _came_to_nothing(self, output: RequestOutput) -> bool:
        """Whether this is the last output of all, and no answer has a token."""
        last = output.finish is not None and len(self._finishes) + 1 == len(self._stream.numbers)
        return last and not output.tokens and not self._record.generated_tokens

    def _observe(self, index: int, output: RequestOutput) -> None:
        self._record.generated_tokens += len(output.tokens)
        if output.first is not None:
            self._record.begin(index, output.first)
        if output.tokens and not self._answered:
            self._answered = True
            self._metrics.first_token(time.monotonic() - self._arrived)
        if output.finish is None:
            return
        self._record.end(index, output.finish)
        self._finishes.append(output.finish)
        if self._complete:
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
            cut=any(finish.cut for finish in self._finishes),
        )


def failure_of(error: RequestError) -> str:
    """TGI's word for a failure, in its metrics."""
    match error:
        case ValidationError() | SuffixNotSupported() | TooManyPrompts():
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
