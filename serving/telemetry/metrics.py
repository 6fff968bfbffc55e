"""Metrics under TGI's names, and our own beside them, in Prometheus' text format.

Knows no request, only events and numbers.
"""

import collections
import math
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from serving.protocol import StepStats

CONTENT_TYPE = "text/plain; charset=utf-8"
DURATION_BUCKETS = tuple(float(f"{0.0001 * 1.5**k:.6g}") for k in range(1, 36))
BATCH_BUCKETS = tuple(float(size) for size in range(1, 1025))
QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
WINDOW_S = 60.0  # of a summary's quantiles
WINDOW_SAMPLES = 8192


class Summary:
    """Quantiles over the last minute, sum and count over all time; a collector for the registry."""

    def __init__(self, name: str, help_text: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._help = help_text
        self._clock = clock
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=WINDOW_SAMPLES)
        self._sum = 0.0
        self._count = 0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._recent.append((self._clock(), value))
        self._sum += value
        self._count += 1

    def collect(self) -> Iterable[Metric]:
        """The one family, as the registry wants it."""
        family = Metric(self._name, self._help, "summary")
        oldest = self._clock() - WINDOW_S
        values = sorted(value for seen, value in self._recent if seen >= oldest) or [0.0]
        for quantile in QUANTILES:
            nearest = values[min(len(values) - 1, int(quantile * len(values)))]
            family.add_sample(self._name, {"quantile": f"{quantile:g}"}, nearest)
        family.add_sample(f"{self._name}_sum", {}, self._sum)
        family.add_sample(f"{self._name}_count", {}, self._count)
        return [family]


class Metrics:
    """Every metric of the server, fed by events; a series shows up with its first event. For one thread.

    Args:
        clock: seconds, growing; for the window of the summaries.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = CollectorRegistry()
        self._block_size = 0

        self._request_count = self._counter("tgi_request_count", "Total number of requests")
        self._request_success = self._counter("tgi_request_success", "Number of successful requests")
        self._request_failure = self._counter("tgi_request_failure", "Number of failed requests", "err")
        self._request = self._duration("tgi_request_duration", "Request duration")
        self._validation = self._duration("tgi_request_validation_duration", "Request validation duration")
        self._queued = self._duration("tgi_request_queue_duration", "Request queue duration")
        self._inference = self._duration("tgi_request_inference_duration", "Request inference duration")
        self._per_token = self._duration("tgi_request_mean_time_per_token_duration", "Mean time per token per request")
        self._generated: Histogram | None = None
        self._input: Histogram | None = None
        self._max_new: Histogram | None = None
        self._skipped = Summary("tgi_request_skipped_tokens", "Speculated tokens per request", clock)
        self._registry.register(self._skipped)

        self._batches = self._counter("tgi_batch_inference_count", "Inference calls per method", "method")
        self._batch_success = self._counter("tgi_batch_inference_success", "Successful calls per method", "method")
        self._batch_inference = self._duration("tgi_batch_inference_duration", "Batch inference duration", "method")
        self._batch_forward = self._duration("tgi_batch_forward_duration", "Batch forward duration", "method")
        self._batch_decode = self._duration("tgi_batch_decode_duration", "Batch decode duration", "method")
        self._batch_concat = self._counter("tgi_batch_concat", "Times a batch joined a running one", "reason")
        self._next_size = self._histogram("tgi_batch_next_size", "Batch sizes", BATCH_BUCKETS)
        self._current_size = self._gauge("tgi_batch_current_size", "Current batch size")
        self._current_tokens = self._gauge("tgi_batch_current_max_tokens", "Maximum tokens for the current batch")
        self._max_total = self._gauge("tgi_batch_max_total_tokens", "Maximum tokens per batch")
        self._queue_size = self._gauge("tgi_queue_size", "Current number of requests in queue")

        self._first_token = self._duration("weir_time_to_first_token_duration", "From request to first token")
        self._step = self._duration("weir_inter_token_duration", "Engine step with decoding sequences and no prompt")
        self._blocks_used = self._gauge("weir_kv_blocks_used", "KV blocks that sequences hold")
        self._blocks_total = self._gauge("weir_kv_blocks", "KV blocks there are")
        self._prompt_tokens = self._counter("weir_prompt_tokens", "Prompt tokens computed")
        self._hit_tokens = self._counter("weir_prefix_hit_tokens", "Prompt tokens that the prefix cache spared")
        self._preemptions = self._counter("weir_preemptions", "Sequences put back because KV blocks ran out")

    def model_loaded(self, *, max_input_tokens: int, max_total_tokens: int, block_size: int) -> None:
        """Learn the limits that the buckets of the token counts end at; to be called once, before any request."""
        total = _linear(max_total_tokens)
        self._block_size = block_size
        self._generated = self._histogram("tgi_request_generated_tokens", "Generated tokens per request", total)
        self._max_new = self._histogram("tgi_request_max_new_tokens", "Maximum new tokens per request", total)
        self._input = self._histogram(
            "tgi_request_input_length", "Input token length per request", _linear(max_input_tokens)
        )

    def request_received(self) -> None:
        """A request for a generation came in."""
        self._request_count.inc()

    def request_validated(self, *, input_length: int, max_new_tokens: int) -> None:
        """It is within the limits."""
        if self._input is not None and self._max_new is not None:
            self._input.observe(input_length)
            self._max_new.observe(max_new_tokens)

    def first_token(self, seconds: float) -> None:
        """Its first token is there, `seconds` after it came in."""
        self._first_token.observe(seconds)

    def request_succeeded(
        self, *, total_s: float, validation_s: float, queue_s: float, inference_s: float, generated_tokens: int
    ) -> None:
        """It was answered to the end."""
        self._request_success.inc()
        self._request.observe(total_s)
        self._validation.observe(validation_s)
        self._queued.observe(queue_s)
        self._inference.observe(inference_s)
        self._per_token.observe(inference_s / max(1, generated_tokens))
        if self._generated is not None:
            self._generated.observe(generated_tokens)

    def request_failed(self, err: str) -> None:
        """It failed: validation, overloaded, template, incomplete, generation or dropped."""
        self._request_failure.labels(err).inc()

    def step(self, stats: StepStats) -> None:
        """The engine did a step; one that computed any prompt counts as `prefill`, as TGI calls it."""
        self._queue_size.set(stats.waiting)
        self._current_size.set(stats.running)
        self._current_tokens.set(stats.blocks_used * self._block_size if stats.running else 0)
        self._max_total.set(stats.blocks_total * self._block_size)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_total.set(stats.blocks_total)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._hit_tokens.inc(stats.cached_tokens)
        self._preemptions.inc(stats.preempted)
        if stats.rows:
            self._batch(stats)

    def render(self) -> bytes:
        """Everything, as text; its content type is `CONTENT_TYPE`."""
        return "".join(_family(metric) for metric in self._registry.collect()).encode()

    def _batch(self, stats: StepStats) -> None:
        method = "prefill" if stats.prompt_tokens else "decode"
        self._batches.labels(method).inc()
        self._batch_success.labels(method).inc()
        self._batch_inference.labels(method).observe(stats.step_s)
        self._batch_forward.labels(method).observe(stats.forward_s)
        self._batch_decode.labels(method).observe(max(0.0, stats.step_s - stats.forward_s))
        self._skipped.observe(0)
        if stats.started:
            self._next_size.observe(stats.started)
            if stats.rows > stats.started:
                self._batch_concat.labels("chunking").inc()
        if not stats.prompt_tokens:
            self._step.observe(stats.step_s)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self._registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        gauge = Gauge(name, help_text, registry=self._registry)
        gauge.set(math.nan)  # never set yet
        return gauge

    def _duration(self, name: str, help_text: str, *labels: str) -> Histogram:
        return Histogram(name, help_text, labels, registry=self._registry, buckets=DURATION_BUCKETS)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, registry=self._registry, buckets=buckets)


def _linear(end: int) -> tuple[float, ...]:
    """A hundred equal steps up to `end`."""
    return tuple(end * step / 100 for step in range(1, 101))


def _family(metric: Metric) -> str:
    """One family in TGI's dialect: no `_total`, no `_created`, nothing that never happened, a blank line at its end."""
    samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    if not _happened(metric.type, samples):
        return ""
    head = [f"# HELP {metric.name} {metric.documentation}", f"# TYPE {metric.name} {metric.type}"]
    return "\n".join([*head, *(_line(metric.type, sample) for sample in samples), "", ""])


def _happened(kind: str, samples: Sequence[Sample]) -> bool:
    if kind == "gauge":
        return not math.isnan(samples[0].value)
    return any(sample.value for sample in samples if not sample.name.endswith("_bucket"))


def _line(kind: str, sample: Sample) -> str:
    name = sample.name.removesuffix("_total") if kind == "counter" else sample.name
    labels = ",".join(f'{label}="{value}"' for label, value in sample.labels.items())
    value = repr(float(sample.value)).removesuffix(".0")
    return f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"
