"""The way to every generation, whatever its dialect: validate, permit, submit.

Knows no JSON and no header.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from serving.api.generation import Generation, failure_of
from serving.bridge import Bridge, Client
from serving.errors import RequestError
from serving.protocol import Request, Session
from serving.telemetry.journal import GenerationRecord, RequestRecord
from serving.telemetry.metrics import Metrics
from serving.validation.chat_template import Conversation
from serving.validation.parameters import Parameters
from serving.validation.validator import Piece, Validated, Validator

LONG_TEXT = 4096  # characters or tokens, from which on tokenising would hold up the hub
MANY_TOKENS = 1024  # from which on writing them down would hold up the hub

P = TypeVar("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        connection: to be watched, for when it ends so does the request; `None` where there is none to watch.
        cache_salt: keeps the cached prefixes of one key's requests apart from another's.
        record: where it is noted what became of the request, if that is to be known.
        session: that the request belongs to, if any.
        adapter: that shall answer, whatever the parameters say; `None` leaves it to them.
        arrived: `time.monotonic()` of when the request came in.
    """

    connection: Client | None
    cache_salt: str
    record: RequestRecord | None = None
    session: Session | None = None
    adapter: str | None = None
    arrived: float


class Inference:
    """What the dialects share.

    Args:
        response_deadline_s: seconds after a request's arrival at which a whole answer is cut with what is there; 0:
            never.
        stream_deadline_s: the same for a streamed one.
    """

    def __init__(
        self,
        bridge: Bridge[Validator],
        metrics: Metrics,
        *,
        response_deadline_s: float = 0.0,
        stream_deadline_s: float = 0.0,
    ) -> None:
        self._bridge = bridge
        self._metrics = metrics
        self._response_deadline_s = response_deadline_s
        self._stream_deadline_s = stream_deadline_s

    def generate(self, text: str, parameters: Parameters, *, stream: bool, caller: Caller) -> Generation:
        """Begin to go on with `text`.

        Args:
            stream: whether the answer is given piece by piece.

        Raises:
            ValidationError: the request breaks a rule.
            Overloaded, NotReady, ShuttingDown: it cannot be taken now.
        """
        return self.complete([text], parameters, stream=stream, caller=caller)

    def complete(
        self, prompts: Sequence[str | Sequence[int]], parameters: Parameters, *, stream: bool, caller: Caller
    ) -> Generation:
        """Begin to go on with each of some texts, or of some lists of token ids.

        Raises:
            TooManyPrompts: more than the operator allows.
            ValidationError, Overloaded, NotReady, ShuttingDown: as `generate`.
        """
        parameters = _adapted(parameters, caller)

        def validate(validator: Validator, prompt: str | Sequence[int]) -> Validated:
            if parameters.grammar is not None:
                return self._bridge.offload_long(validator.validate, prompt, parameters)
            if len(prompt) > LONG_TEXT:
                return self._bridge.offload(validator.validate, prompt, parameters)
            return validator.validate(prompt, parameters)

        return self._begin(prompts, validate, parameters, stream=stream, caller=caller)

    def chat(self, conversation: Conversation, parameters: Parameters, *, stream: bool, caller: Caller) -> Generation:
        """Begin to answer a conversation.

        Raises:
            TemplateError: the model's template is missing or refuses them.
            ValidationError, Overloaded, NotReady, ShuttingDown: as `generate`.
        """
        parameters = _adapted(parameters, caller)

        def validate(validator: Validator, asked: Conversation) -> Validated:
            offload = self._bridge.offload if parameters.grammar is None else self._bridge.offload_long
            return offload(validator.validate_chat, asked, parameters)

        return self._begin([conversation], validate, parameters, stream=stream, caller=caller)

    def tokenize(self, text: str) -> list[Piece]:
        """The tokens of `text`. Raises NotReady, ShuttingDown."""
        tokenize = self._bridge.loaded().tokenize
        return self._bridge.offload(tokenize, text) if len(text) > LONG_TEXT else tokenize(text)

    def tokenize_chat(self, conversation: Conversation) -> tuple[str, list[Piece]]:
        """The text that a conversation becomes, and its tokens.

        Raises:
            TemplateError, ValidationError, NotReady, ShuttingDown: as `chat`.
        """
        validator = self._bridge.loaded()
        self._metrics.request_received()
        return self._bridge.offload(validator.tokenize_chat, conversation)

    def write(self, make: Callable[[], T], *, tokens: int) -> T:
        """What `make` makes, off the hub if so many tokens take long to write down."""
        return self._bridge.offload(make) if tokens > MANY_TOKENS else make()

    def _begin(
        self,
        asked: Sequence[P],
        validate: Callable[[Validator, P], Validated],
        parameters: Parameters,
        *,
        stream: bool,
        caller: Caller,
    ) -> Generation:
        record = GenerationRecord(arrived=time.monotonic(), stream=stream)
        if caller.record is not None:
            caller.record.generations.append(record)
        validator = self._bridge.loaded()
        self._metrics.request_received()
        try:
            with ExitStack() as held:
                answers = len(asked) * validator.samples(parameters, stream=stream, prompts=len(asked))
                permits = [held.enter_context(self._bridge.permit()) for _ in range(answers)]
                prompts = [validate(validator, prompt) for prompt in asked]
                _note(record, prompts, parameters.adapter_id)
                for prompt in prompts:
                    self._metrics.request_validated(
                        input_length=prompt.input_length, max_new_tokens=prompt.requests[0].stop.max_new_tokens
                    )
                deadline_s = self._stream_deadline_s if stream else self._response_deadline_s
                deadline = caller.arrived + deadline_s if deadline_s else None
                requests = [_marked(request, caller, deadline) for prompt in prompts for request in prompt.requests]
                answering = self._bridge.submit_all(requests, caller.connection, permits)
        except RequestError as error:
            record.error = failure_of(error)
            self._metrics.request_failed(record.error)
            raise
        return Generation(answering, prompts, self._metrics, record)


def _adapted(parameters: Parameters, caller: Caller) -> Parameters:
    return parameters if caller.adapter is None else dataclasses.replace(parameters, adapter_id=caller.adapter)


def _note(record: GenerationRecord, prompts: Sequence[Validated], adapter: str | None) -> None:
    requests = [request for prompt in prompts for request in prompt.requests]
    record.validated = time.monotonic()
    record.input_length = sum(prompt.input_length for prompt in prompts)
    record.max_new_tokens = requests[0].stop.max_new_tokens
    record.sampling = requests[0].sampling
    record.adapter = adapter
    record.seeds = [seed for prompt in prompts for seed in prompt.seeds]


def _marked(request: Request, caller: Caller, deadline: float | None) -> Request:
    return msgspec.structs.replace(request, cache_salt=caller.cache_salt, session=caller.session, deadline=deadline)
