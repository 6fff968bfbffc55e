"""Traces over OTLP: one a request, with spans for validation, queue, prefill and decode.

Knows no request in the making, only records of finished ones; OpenTelemetry is imported when a tracer is made.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import msgspec

from serving import __version__
from serving.errors import ConfigurationError
from serving.protocol import SamplingParams
from serving.telemetry.journal import GenerationRecord, RequestRecord

HTTP_PORT = 4318
HTTP_PATH = "/v1/traces"
HOST = re.compile(r"[a-z0-9._:-]+")
PROVIDER = "weir"
OPERATIONS = MappingProxyType({"chat_completions": "chat", "sagemaker_compatibility": "generate_content"})
LARGEST_INTEGER = 2**63 - 1  # of an attribute

Attributes = dict[str, str | int | float | bool | list[str]]


class OTLPTracer:
    """Makes spans of records and sends them, in batches and from a thread of the SDK's, to a collector.

    What a client's `traceparent` says of sampling holds; without one, every request is traced unless the SDK's own
    variable OTEL_TRACES_SAMPLER says otherwise.

    Args:
        endpoint: a collector's address; see `is_http`.
        service_name: the name in the traces.

    Raises:
        ConfigurationError: the address cannot be one.
    """

    def __init__(self, endpoint: str, service_name: str) -> None:
        # Imported here: they take 10 MiB over HTTP and 20 MiB over gRPC, and most servers send no traces.
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._otel = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name, "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
        self._tracer = self._provider.get_tracer("weir", __version__)

    def trace(self, record: RequestRecord) -> str | None:
        """See `journal.Tracer`."""
        kind, context = self._otel.SpanKind, self._context_of(record)
        root = self._tracer.start_span(
            record.handler,
            context=context,
            kind=kind.SERVER,
            attributes=request_attributes(record),
            start_time=record.arrived_ns,
        )
        if root.is_recording():
            inside = self._otel.set_span_in_context(root, context)
            for generation in record.generations:
                self._trace_generation(record, generation, inside)
            if record.is_fault:
                root.set_status(self._otel.StatusCode.ERROR)
        root.end(_ns(record, record.ended))
        return self._otel.format_trace_id(root.get_span_context().trace_id)

    def close(self) -> None:
        """See `journal.Tracer`."""
        self._provider.shutdown()

    def _context_of(self, record: RequestRecord) -> Any:
        from opentelemetry.context import Context  # noqa: PLC0415

        headers = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        return self._propagator.extract({name: value for name, value in headers.items() if value}, context=Context())

    def _trace_generation(self, record: RequestRecord, generation: GenerationRecord, context: Any) -> None:
        def child(name: str, start: float, end: float, attributes: Mapping[str, Any]) -> None:
            span = self._tracer.start_span(name, context=context, attributes=attributes, start_time=_ns(record, start))
            span.end(_ns(record, end))

        validated = generation.validated
        child("validate", generation.arrived, record.ended if validated is None else validated, {})
        for number, sample in generation.samples.items():
            which = {"sample": number} if len(generation.seeds) > 1 else {}
            first = sample.first
            child("queue", first.arrived, first.begun, which)
            child("prefill", first.begun, first.reached, which | {"prompt_tokens": generation.input_length})
            child("decode", first.reached, record.ended if sample.ended is None else sample.ended, which)


def is_http(endpoint: str) -> bool:
    """Whether a collector is spoken to over HTTP: the path is `/v1/traces` or the port 4318. Else it is gRPC.

    Raises:
        ConfigurationError: this is no `http://host:port` or `https://host:port`.
    """
    try:
        parts = urlsplit(_with_scheme(endpoint))
        port = parts.port
    except ValueError:
        parts, port = None, None
    if parts is None or parts.scheme not in ("http", "https") or not HOST.fullmatch(parts.hostname or ""):
        raise ConfigurationError(f"--otlp-endpoint must be like http://localhost:4317. Given: {endpoint}")
    return parts.path.rstrip("/").endswith(HTTP_PATH) or port == HTTP_PORT


def request_attributes(record: RequestRecord) -> Attributes:
    """Of a request's span: OpenTelemetry's names for HTTP and generative models, then TGI's; times in seconds."""
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "request_id": record.request_id,
        "error.type": record.error,
        "total_time": record.total_s,
    }
    if record.generations:
        attributes |= _generation_attributes(record)
    return {name: value for name, value in attributes.items() if value is not None}


def _generation_attributes(record: RequestRecord) -> dict[str, Any]:
    generation, seeds = record.generations[0], record.seeds
    reasons = [str(sample.reason) for sample in record.samples() if sample.reason is not None]
    return {
        "gen_ai.operation.name": OPERATIONS.get(record.handler, "text_completion"),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": generation.adapter or record.model,
        "gen_ai.response.model": generation.adapter or record.model,
        "gen_ai.request.stream": generation.stream,
        "gen_ai.request.max_tokens": generation.max_new_tokens or None,
        "gen_ai.request.seed": seeds[0] if len(seeds) == 1 and seeds[0] <= LARGEST_INTEGER else None,
        **_sampling_attributes(generation.sampling),
        "gen_ai.usage.input_tokens": record.input_length or None,
        "gen_ai.usage.output_tokens": record.generated_tokens,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.response.time_to_first_chunk": record.first_token_s,
        "parameters": _parameters(generation),
        "validation_time": record.validation_s,
        "queue_time": record.queue_s,
        "inference_time": record.inference_s,
        "time_per_token": record.time_per_token_s,
        "seed": ",".join(map(str, seeds)) or None,
    }


def _sampling_attributes(sampling: SamplingParams | None) -> dict[str, Any]:
    if sampling is None:
        return {}
    drawn = sampling.do_sample
    return {
        "gen_ai.request.temperature": sampling.temperature if drawn else 0.0,
        "gen_ai.request.top_p": sampling.top_p if drawn and sampling.top_p < 1 else None,
        "gen_ai.request.top_k": sampling.top_k if drawn and sampling.top_k else None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
    }


def _parameters(generation: GenerationRecord) -> str | None:
    """What differs from the defaults, as JSON; numbers and flags only, since all else is a client's text."""
    if generation.sampling is None:
        return None
    said = {
        name: value
        for name, value in msgspec.structs.asdict(generation.sampling).items()
        if isinstance(value, bool | int | float) and value != getattr(SamplingParams(), name)
    }
    if generation.sampling.watermark is not None:
        said["watermark"] = True
    return msgspec.json.encode(said | {"max_new_tokens": generation.max_new_tokens}).decode()


def _exporter(endpoint: str) -> Any:
    address = _with_scheme(endpoint)
    if is_http(endpoint):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        path = urlsplit(address).path.rstrip("/")
        return OTLPSpanExporter(endpoint=address if path else address.rstrip("/") + HTTP_PATH)
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter  # noqa: PLC0415

    return trace_exporter.OTLPSpanExporter(endpoint=address)


def _with_scheme(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"http://{endpoint}"


def _ns(record: RequestRecord, moment: float) -> int:
    """A moment of `time.monotonic()` as nanoseconds since 1970."""
    return record.arrived_ns + int((moment - record.arrived) * 1e9)
