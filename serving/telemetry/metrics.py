"""Metrics under TGI's names, and our own beside them, in Prometheus' text format.

Knows no request, only events and numbers.
"""

import bisect
import collections
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from serving.protocol import StepStats

CONTENT_TYPE = "text/plain; charset=utf-8"
DURATION_BUCKETS = tuple(
    itertools.islice(itertools.accumulate(itertools.repeat(1.5), float.__mul__, initial=1e-4), 1, 36)
)
BATCH_BUCKETS = tuple(float(size) for size in range(1, 1025))
QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
WINDOW_S = 60.0  # of a summary's quantiles
METHODS = "(prefill or decode)"


class Summary:
    """Quantiles over the last minute, sum and count over all time; a collector for the registry."""

    def __init__(self, name: str, help_text: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._help = help_text
        self._clock = clock
        self._recent: collections.deque[tuple[int, collections.Counter[float]]] = collections.deque()  # by second
        self._sum = 0.0
        self._count = 0

    def observe(self, values: Sequence[float]) -> None:
        """Count some observations."""
        second = int(self._clock())
        if not self._recent or self._recent[-1][0] != second:
            self._recent.append((second, collections.Counter()))
            self._forget(second)
        self._recent[-1][1].update(values)
        self._sum += sum(values)
        self._count += len(values)

    def collect(self) -> Iterable[Metric]:
        """The one family, as the registry wants it."""
        family = Metric(self._name, self._help, "summary")
        self._forget(int(self._clock()))
        recent = sum((counts for _, counts in self._recent), collections.Counter[float]()) or {0.0: 1}
        values = sorted(recent)
        ranks = list(itertools.accumulate(recent[value] for value in values))
        for quantile in QUANTILES:
            nearest = bisect.bisect_right(ranks, min(ranks[-1] - 1, int(quantile * ranks[-1])))
            family.add_sample(self._name, {"quantile": f"{quantile:g}"}, values[nearest])
        family.add_sample(f"{self._name}_sum", {}, self._sum)
        family.add_sample(f"{self._name}_count", {}, self._count)
        return [family]

    def _forget(self, now: int) -> None:
        while self._recent and self._recent[0][0] <= now - WINDOW_S:
            self._recent.popleft()


class CountedHistogram:
    """A histogram whose observations come with how often each was made; a collector for the registry."""

    def __init__(self, name: str, help_text: str, buckets: tuple[float, ...]) -> None:
        self._name = name
        self._help = help_text
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Count `value`, made `count` times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        """The one family, as the registry wants it."""
        family = Metric(self._name, self._help, "histogram")
        for bound, count in zip(self._bounds, itertools.accumulate(self._counts), strict=True):
            family.add_sample(f"{self._name}_bucket", {"le": "+Inf" if bound == math.inf else repr(bound)}, count)
        family.add_sample(f"{self._name}_count", {}, sum(self._counts))
        family.add_sample(f"{self._name}_sum", {}, self._sum)
        return [family]


class Metrics:
    """Every metric of the server, fed by events. For one thread.

    A series of TGI's shows up with its first event, as it does there; ours show up together with the first step.

    Args:
        clock: seconds, growing; for the window of the summaries.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._tgi = CollectorRegistry()
        self._weir = CollectorRegistry()
        self._stepped = False
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
        self._tgi.register(self._skipped)

        self._batches = self._counter("tgi_batch_inference_count", f"Inference calls per method {METHODS}", "method")
        self._batch_success = self._counter(
            "tgi_batch_inference_success", f"Number of successful inference calls per method {METHODS}", "method"
        )
        self._batch_failure = self._counter(
            "tgi_batch_inference_failure", f"Number of failed inference calls per method {METHODS}", "method"
        )
        self._batch_inference = self._duration("tgi_batch_inference_duration", "Batch inference duration", "method")
        self._batch_forward = self._duration(
            "tgi_batch_forward_duration", f"Batch forward duration per method {METHODS}", "method"
        )
        self._batch_decode = self._duration(
            "tgi_batch_decode_duration", f"Time spent decoding a batch per method {METHODS}", "method"
        )
        self._batch_filter = self._duration(
            "tgi_batch_filter_duration",
            f"Time spent filtering batches and sending generated tokens per method {METHODS}",
            "method",
        )
        self._batch_concat = self._counter("tgi_batch_concat", "Times requests joined a running batch", "reason")
        self._batch_join = self._duration(
            "tgi_batch_concat_duration", "Time spent joining requests to a running batch", "method"
        )
        self._next_size = self._histogram("tgi_batch_next_size", "Batch size of the next batch", BATCH_BUCKETS)
        self._current_size = self._gauge("tgi_batch_current_size", "Current batch size")
        self._current_tokens = self._gauge("tgi_batch_current_max_tokens", "Maximum tokens for the current batch")
        self._max_total = self._gauge("tgi_batch_max_total_tokens", "Maximum tokens that the KV cache holds")
        self._queue_size = self._gauge("tgi_queue_size", "Current queue size")

        ours = self._weir
        self._first_token = Histogram(
            "weir_time_to_first_token_duration", "From a request's arrival to its first token",
            registry=ours, buckets=DURATION_BUCKETS,
        )  # fmt: skip
        self._gap = CountedHistogram(
            "weir_inter_token_duration", "Between two tokens of a generation", DURATION_BUCKETS
        )
        ours.register(self._gap)
        self._blocks_used = Gauge("weir_kv_blocks_used", "KV blocks that sequences hold", registry=ours)
        self._blocks_leased = Gauge(
            "weir_kv_blocks_leased", "KV blocks that sessions keep while there is room", registry=ours
        )
        self._blocks_total = Gauge("weir_kv_blocks", "KV blocks there are", registry=ours)
        self._prompt_tokens = Counter("weir_prompt_tokens", "Prompt tokens computed", registry=ours)
        self._generated_tokens = Counter("weir_generated_tokens", "Tokens generated", registry=ours)
        self._queried_tokens = Counter(
            "weir_prefix_queried_tokens", "Prompt tokens that were looked up in the prefix cache", registry=ours
        )
        self._hit_tokens = Counter(
            "weir_prefix_hit_tokens", "Prompt tokens that the prefix cache spared", registry=ours
        )
        self._preemptions = Counter("weir_preemptions", "Sequences put back because KV blocks ran out", registry=ours)

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
        self._stepped = True
        self._queue_size.set(stats.waiting)
        self._current_size.set(stats.running)
        self._current_tokens.set(stats.most_tokens)
        self._max_total.set(stats.blocks_total * self._block_size)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_leased.set(stats.blocks_leased)
        self._blocks_total.set(stats.blocks_total)
        self._preemptions.inc(stats.preempted)
        if stats.rows:
            method = "prefill" if stats.prompt_tokens else "decode"
            self._batches.labels(method).inc()
            if stats.failed:
                self._batch_failure.labels(method).inc()
            else:
                self._batch(stats, method)

    def render(self) -> bytes:
        """Everything, as text; its content type is `CONTENT_TYPE`."""
        return "".join(self._families()).encode()

    def _families(self) -> Iterator[str]:
        for metric in self._tgi.collect():
            if _happened(metric):
                yield _family(metric)
        if self._stepped:
            yield from map(_family, self._weir.collect())

    def _batch(self, stats: StepStats, method: str) -> None:
        self._batch_success.labels(method).inc()
        self._batch_inference.labels(method).observe(stats.step_s)
        self._batch_forward.labels(method).observe(stats.forward_s)
        self._batch_decode.labels(method).observe(stats.decode_s)
        self._batch_filter.labels(method).observe(stats.filter_s)
        if stats.started:
            self._next_size.observe(stats.started)
        if stats.joined:
            self._batch_concat.labels("chunking").inc()
            self._batch_join.labels("decode").observe(stats.join_s)
        if stats.skipped:
            self._skipped.observe(stats.skipped)
        for seconds, sequences in stats.gaps:
            self._gap.observe(seconds, sequences)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated_tokens.inc(len(stats.skipped) + sum(stats.skipped))
        self._queried_tokens.inc(stats.queried_tokens)
        self._hit_tokens.inc(stats.cached_tokens)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self._tgi)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        gauge = Gauge(name, help_text, registry=self._tgi)
        gauge.set(math.nan)  # never set yet
        return gauge

    def _duration(self, name: str, help_text: str, *labels: str) -> Histogram:
        return Histogram(name, help_text, labels, registry=self._tgi, buckets=DURATION_BUCKETS)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, registry=self._tgi, buckets=buckets)


def _linear(end: int) -> tuple[float, ...]:
    """A hundred equal steps up to `end`."""
    return tuple(end / 100 * step for step in range(1, 101))


def _family(metric: Metric) -> str:
    """One family in TGI's dialect: no `_total`, no `_created`, a blank line at its end."""
    samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    head = [f"# HELP {metric.name} {metric.documentation}", f"# TYPE {metric.name} {metric.type}"]
    return "\n".join([*head, *(_line(metric.type, sample) for sample in samples), "", ""])


def _happened(metric: Metric) -> bool:
    if metric.type == "gauge":
        return not math.isnan(metric.samples[0].value)
    return any(sample.value for sample in metric.samples if not sample.name.endswith(("_bucket", "_created")))


def _line(kind: str, sample: Sample) -> str:
    name = sample.name.removesuffix("_total") if kind == "counter" else sample.name
    labels = ",".join(
        f'{label}="{_bound(value) if label == "le" else value}"' for label, value in sample.labels.items()
    )
    return f"{name}{{{labels}}} {_number(sample.value)}" if labels else f"{name} {_number(sample.value)}"


def _bound(bucket: str) -> str:
    """A bucket's bound as TGI writes it: whole numbers without a point."""
    return bucket.removesuffix(".0")


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
