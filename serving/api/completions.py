"""OpenAI's older dialect: `/v1/completions`.

Knows nothing of chats, nor of TGI's own dialect.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from flask import Response
from msgspec import UNSET, UnsetType

from serving.api import errors, sse
from serving.api.body import load_as, read_body
from serving.api.caller import caller
from serving.api.generation import Answer, Generation
from serving.api.headers import stream_headers, timing_headers
from serving.api.identity import Identity
from serving.api.inference import Inference
from serving.api.models import Models
from serving.api.openai import FINISH_REASONS, new_id, usage_of
from serving.api.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionRequest,
)
from serving.api.schemas.float32 import shortest
from serving.api.schemas.openai import Usage
from serving.bridge import Bridge
from serving.protocol import Finish, OutputToken, RequestOutput, TokenLogprob
from serving.validation.validator import Validator

SEARCHED = 16  # characters in which a prompt's token is looked for, since its own text may differ from the prompt's

MakeChunk = Callable[[list[CompletionChoice], Usage | UnsetType | None], bytes]


class Completions:
    """The handler of the route."""

    def __init__(self, bridge: Bridge[Validator], inference: Inference, identity: Identity, models: Models) -> None:
        self._bridge = bridge
        self._inference = inference
        self._identity = identity
        self._models = models

    def completions(self) -> Response:
        """`POST /v1/completions`."""
        return self.answer(read_body(self._bridge, load_as(CompletionRequest)))

    def answer(self, asked: CompletionRequest) -> Response:
        """What prompts are answered."""
        if not asked.stream:
            return self.begin_whole(asked)[1]()
        compute_type = self._compute_type()
        generation, model = self._begin(asked, stream=True)
        return self._streamed(asked, generation, model, compute_type)

    def begin_whole(self, asked: CompletionRequest) -> tuple[Generation, Callable[[], Response]]:
        """Begin what prompts are answered whole; the second waits for it."""
        compute_type = self._compute_type()
        generation, model = self._begin(asked, stream=False)
        return generation, lambda: self._whole(asked, generation, model, compute_type)

    def _begin(self, asked: CompletionRequest, *, stream: bool) -> tuple[Generation, str]:
        """Begin to answer prompts; also tells the name that the answer bears."""
        who = caller()
        adapter = who.adapter or self._models.adapter_in(asked.model)
        parameters = dataclasses.replace(asked.checked_later(), adapter_id=adapter)
        generation = self._inference.complete(asked.prompts(), parameters, stream=stream, caller=who)
        return generation, adapter or self._identity.model_id

    def _compute_type(self) -> str:
        return self._identity.compute_type_on(self._bridge.loaded().facts)

    def _whole(self, asked: CompletionRequest, generation: Generation, model: str, compute_type: str) -> Response:
        answers, timings = generation.collect()
        if asked.only_echoes:
            answers = [dataclasses.replace(answer, tokens=[], finish=_unsaid(answer.finish)) for answer in answers]
            timings = dataclasses.replace(timings, generated_tokens=0)

        def choices() -> list[CompletionChoice]:
            return _choices(asked, generation, answers)

        told = 0 if asked.logprobs is None else sum(answer.told_tokens for answer in answers)
        completion = Completion(
            id=new_id("cmpl"),
            created=int(time.time()),
            model=model,
            system_fingerprint=self._identity.system_fingerprint,
            choices=self._inference.write(choices, tokens=told),
            usage=usage_of(generation.validated.input_length, timings.generated_tokens),
        )
        return Response(
            msgspec.json.encode(completion),
            headers=timing_headers(compute_type, generation.validated, timings),
            content_type="application/json",
        )

    def _streamed(self, asked: CompletionRequest, generation: Generation, model: str, compute_type: str) -> Response:
        name, created = new_id("cmpl"), int(time.time())

        def chunk(choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
            return sse.event(
                CompletionChunk(
                    id=name,
                    created=created,
                    choices=choices,
                    model=model,
                    system_fingerprint=self._identity.system_fingerprint,
                    usage=usage,
                )
            )

        frames = _frames(sse.begun(generation.outputs()), asked, generation, chunk)
        headers = stream_headers(compute_type, generation.validated.characters)
        return sse.response(sse.guarded(frames, errors.openai_body, farewell=sse.DONE), headers, generation.close)


class Trail:
    """Writes an answer's log probabilities piece by piece, and so knows where in its text a token stands.

    Args:
        alternatives: whether some were asked for.
        echo: the prompt's text, where the answer begins with it.
    """

    def __init__(self, *, alternatives: bool, echo: str) -> None:
        self._alternatives = alternatives
        self._echo = echo
        self._offset = len(echo)

    def logprobs(self, prompt: Sequence[TokenLogprob], tokens: Sequence[OutputToken]) -> CompletionLogprobs:
        """Of the prompt's tokens, if they are given, and the answer's next ones."""
        offsets = self._places(prompt)
        for token in tokens:
            offsets.append(self._offset)
            self._offset += 0 if token.special else len(token.text)
        top = [*(None for _ in prompt), *(_top(token) for token in tokens)]
        told: list[TokenLogprob | OutputToken] = [*prompt, *tokens]
        return CompletionLogprobs(
            tokens=[token.text for token in told],
            token_logprobs=[shortest(token.logprob) for token in told],
            top_logprobs=top if self._alternatives else None,
            text_offset=offsets,
        )

    def _places(self, prompt: Sequence[TokenLogprob]) -> list[int]:
        places, at = [], 0
        for token in prompt:
            places.append(at)
            found = self._echo.find(token.text, at, at + len(token.text) + SEARCHED)
            at = at if found < 0 else found + len(token.text)
        return places


def _choices(asked: CompletionRequest, generation: Generation, answers: Sequence[Answer]) -> list[CompletionChoice]:
    made, given = len(answers) // len(generation.prompts), asked.choices_per_prompt
    choices: list[CompletionChoice] = []
    for place, prompt in enumerate(generation.prompts):
        own = list(answers[place * made : (place + 1) * made])
        if given < made:
            own = sorted(own, key=lambda answer: answer.mean_logprob, reverse=True)[:given]
        echo = prompt.text if asked.echo else ""
        for answer in own:
            trail = Trail(alternatives=bool(asked.logprobs), echo=echo)
            choices.append(
                CompletionChoice(
                    index=len(choices),
                    text=echo + answer.finish.text,
                    logprobs=None if asked.logprobs is None else trail.logprobs(answer.prompt, answer.tokens),
                    finish_reason=FINISH_REASONS[answer.finish.reason],
                )
            )
    return choices


def _frames(
    outputs: Iterator[tuple[int, RequestOutput] | None],
    asked: CompletionRequest,
    generation: Generation,
    chunk: MakeChunk,
) -> Iterator[bytes]:
    """The events; each choice's last one tells its usage, as in TGI, unless one for all is to come, as in OpenAI."""
    prompts = [prompt for prompt in generation.prompts for _ in range(asked.choices_per_prompt)]
    echoes = [prompt.text if asked.echo else "" for prompt in prompts]
    trails = [Trail(alternatives=bool(asked.logprobs), echo=echo) for echo in echoes]
    generated = [0] * len(prompts)
    at_end = asked.stream_options is not None and asked.stream_options.include_usage
    for item in outputs:
        if item is None:
            yield sse.KEEP_ALIVE
            continue
        index, output = item
        if asked.only_echoes and output.finish is not None:
            output = msgspec.structs.replace(output, tokens=[], text="", finish=_unsaid(output.finish))
        text = output.text if generated[index] else echoes[index] + output.text
        generated[index] += len(output.tokens)
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=None if asked.logprobs is None else trails[index].logprobs(output.prompt, output.tokens),
            finish_reason=None if output.finish is None else FINISH_REASONS[output.finish.reason],
        )
        usage: Usage | UnsetType | None = None if at_end else UNSET
        if output.finish is not None and not at_end:
            usage = usage_of(prompts[index].input_length, generated[index])
        yield chunk([choice], usage)
    if at_end:
        yield chunk([], usage_of(generation.validated.input_length, sum(generated)))
    yield sse.DONE


def _unsaid(finish: Finish) -> Finish:
    return msgspec.structs.replace(finish, text="", generated_tokens=0)


def _top(token: OutputToken) -> dict[str, float | None]:
    top: dict[str, float | None] = {}
    for alternative in token.top:  # best first; of several with the same text the best one counts
        top.setdefault(alternative.text, shortest(alternative.logprob))
    if all(alternative.id != token.id for alternative in token.top):
        top.setdefault(token.text, shortest(token.logprob))
    return top
