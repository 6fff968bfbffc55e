"""What stays of each request once it is answered: a line in the log, and a trace where traces are wanted.

Knows no web framework and no OpenTelemetry, and is never told a prompt or an answer.
"""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.protocol import Finish, FinishReason, FirstToken, SamplingParams

CAPACITY = 8192  # records that may wait to be written; beyond it they are lost, so that nobody waits for a log
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SampleRecord:
    """One answer's way through the engine.

    Attributes:
        ended: `time.monotonic()` of its last token; None if it never had one.
    """

    first: FirstToken
    ended: float | None = None
    reason: FinishReason | None = None


@dataclass(slots=True)
class GenerationRecord:
    """The answers to what was submitted at once: one prompt, or several of one request.

    Attributes:
        arrived, validated: in seconds of `time.monotonic()`; `validated` is None if it broke a rule.
        input_length: tokens of the prompts.
        sampling: how tokens are chosen; what of it is a client's text is not shown.
        adapter: the name of the loaded one that answers, if any.
        seeds: each answer's; None where its tokens are not drawn.
        samples: by the answer's number; those that have a first token.
        generated_tokens: of all answers, even of those that did not end.
        error: why it failed: TGI's word in `tgi_request_failure`.
    """

    arrived: float
    stream: bool
    validated: float | None = None
    input_length: int = 0
    max_new_tokens: int = 0
    sampling: SamplingParams | None = None
    adapter: str | None = None
    seeds: list[int | None] = field(default_factory=list)
    samples: dict[int, SampleRecord] = field(default_factory=dict)
    generated_tokens: int = 0
    error: str | None = None

    @property
    def outcome(self) -> str | None:
        """Why not every answer has its last token; None if every one has."""
        if self.error is None and sum(sample.ended is not None for sample in self.samples.values()) < len(self.seeds):
            return "dropped"
        return self.error

    def begin(self, sample: int, first: FirstToken) -> None:
        """An answer has its first token."""
        self.samples[sample] = SampleRecord(first)

    def end(self, sample: int, finish: Finish) -> None:
        """An answer has its last token."""
        record = self.samples[sample]
        record.ended = record.first.arrived + finish.queue_s + finish.inference_s
        record.reason = finish.reason


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One HTTP request.

    Attributes:
        handler: TGI's name for what serves it.
        route: the path's pattern.
        traceparent, tracestate: the client's headers of these names.
        arrived, ended: in seconds of `time.monotonic()`.
        arrived_ns: `arrived` as nanoseconds since 1970.
        status: of the HTTP answer.
        generations: one for each time the engine was asked.
    """

    handler: str
    method: str
    route: str
    request_id: str
    model: str
    traceparent: str = ""
    tracestate: str = ""
    arrived: float = field(default_factory=time.monotonic)
    arrived_ns: int = field(default_factory=time.time_ns)
    ended: float = 0.0
    status: int = 0
    generations: list[GenerationRecord] = field(default_factory=list)

    def close(self) -> None:
        """The answer has ended."""
        self.ended = time.monotonic()

    @property
    def total_s(self) -> float:
        """From the request's head to the answer's end."""
        return self.ended - self.arrived

    @property
    def validation_s(self) -> float | None:
        """Of the prompt that took longest."""
        return _longest(
            generation.validated - generation.arrived
            for generation in self.generations
            if generation.validated is not None
        )

    @property
    def queue_s(self) -> float | None:
        """Of the answer that waited longest, among those that have a first token."""
        return _longest(sample.first.begun - sample.first.arrived for sample in self.samples())

    @property
    def inference_s(self) -> float | None:
        """Of the answer that took longest, among those that have their last token."""
        return _longest(sample.ended - sample.first.begun for sample in self.samples() if sample.ended is not None)

    @property
    def first_token_s(self) -> float | None:
        """From the request's head to the first token of the first answer."""
        reached = [sample.first.reached for sample in self.samples()]
        return min(reached) - self.arrived if reached else None

    @property
    def time_per_token_s(self) -> float | None:
        """Inference over generated tokens."""
        inference_s = self.inference_s
        return None if inference_s is None else inference_s / max(1, self.generated_tokens)

    @property
    def input_length(self) -> int:
        """Tokens of all prompts."""
        return sum(generation.input_length for generation in self.generations)

    @property
    def generated_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(generation.generated_tokens for generation in self.generations)

    @property
    def seeds(self) -> list[int]:
        """Of the answers whose tokens were drawn."""
        return [seed for generation in self.generations for seed in generation.seeds if seed is not None]

    @property
    def adapters(self) -> list[str]:
        """Those that answered, each once."""
        return list(dict.fromkeys(each.adapter for each in self.generations if each.adapter is not None))

    @property
    def error(self) -> str | None:
        """Why it failed, in a word: TGI's, or the status."""
        errors = [outcome for generation in self.generations if (outcome := generation.outcome) is not None]
        if errors:  # a failed part of a request has its siblings dropped
            return next((error for error in errors if error != "dropped"), errors[0])
        return str(self.status) if self.status >= 400 else None

    @property
    def is_fault(self) -> bool:
        """Whether the server, and not the client, is why it failed."""
        return self.status >= 500 or self.error in ("generation", "incomplete")

    def samples(self) -> list[SampleRecord]:
        """Every answer that has a first token."""
        return [sample for generation in self.generations for sample in generation.samples.values()]

    def fields(self) -> dict[str, Any]:
        """What a log shows of it; times in seconds."""
        known = {
            "handler": self.handler,
            "status": self.status,
            "error": self.error,
            "total_time": self.total_s,
            "validation_time": self.validation_s,
            "queue_time": self.queue_s,
            "inference_time": self.inference_s,
            "time_per_token": self.time_per_token_s,
            "seed": self.seeds[0] if len(self.seeds) == 1 else self.seeds or None,
            "prompt_tokens": self.input_length or None,
            "generated_tokens": self.generated_tokens if self.generations else None,
            "adapter": ",".join(self.adapters) or None,
            "request_id": self.request_id,
        }
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in known.items()
            if value is not None
        }


class Tracer(Protocol):
    """Whoever makes a trace of a record."""

    def trace(self, record: RequestRecord) -> str | None:
        """Hand the request's spans on; the trace's id in hexadecimal digits, if it has one."""
        ...

    def close(self) -> None:
        """Send what was not sent yet."""
        ...


class Journal:
    """Writes records down in a thread of its own, since a log's reader or a collector may be slow.

    Args:
        make_tracer: called in that thread; None where no traces are wanted.
    """

    def __init__(self, make_tracer: Callable[[], Tracer] | None = None) -> None:
        self._make_tracer = make_tracer
        self._inbox: queue.SimpleQueue[RequestRecord | None] = queue.SimpleQueue()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def add(self, record: RequestRecord) -> None:
        """Take a finished request's record, which nobody changes any more. Never waits."""
        if self._make_tracer is None and not log.isEnabledFor(_level(record)):
            return
        if self._inbox.qsize() >= CAPACITY:
            self._lost += 1
            return
        self._inbox.put(record)

    def close(self, patience_s: float = 2.0) -> None:
        """Write what is left, for so long; then leave the rest. Safe to call twice."""
        self._inbox.put(None)
        self._thread.join(patience_s)

    def _run(self) -> None:
        tracer = self._start_tracer()
        reported = 0
        while (record := self._inbox.get()) is not None:
            try:
                _write(record, tracer)
            except Exception:
                log.exception("a request's record could not be written")
            if self._lost > reported:
                log.warning("%d requests were not logged: the log is read too slowly", self._lost - reported)
                reported = self._lost
        if tracer is not None:
            tracer.close()

    def _start_tracer(self) -> Tracer | None:
        try:
            return None if self._make_tracer is None else self._make_tracer()
        except Exception:
            log.exception("traces cannot be sent; requests are served without them")
            return None


def _write(record: RequestRecord, tracer: Tracer | None) -> None:
    trace_id = tracer.trace(record) if tracer is not None else _trace_id(record.traceparent)
    level = _level(record)
    if log.isEnabledFor(level):
        fields = record.fields() | ({"trace_id": trace_id} if trace_id else {})
        log.log(level, "Success" if record.error is None else "Failure", extra={"fields": fields})


def _level(record: RequestRecord) -> int:
    return logging.WARNING if record.is_fault else logging.INFO


def _trace_id(traceparent: str) -> str | None:
    match = TRACEPARENT.fullmatch(traceparent)
    return match[1] if match else None


def _longest(seconds: Any) -> float | None:
    return max(seconds, default=None)
