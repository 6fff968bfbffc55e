"""Traces and log lines of a real server, seen by collectors that listen over gRPC and over HTTP."""

import http.server
import json
import queue
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import psutil
import pytest
import requests
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

pytestmark = pytest.mark.server

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CANARY = "Zanzibar-canary-42"
SHORT = {"inputs": CANARY, "parameters": {"max_new_tokens": 6, "ignore_eos": True}}
DRAWN = {"inputs": CANARY, "parameters": {"max_new_tokens": 6, "ignore_eos": True, "do_sample": True, "seed": 7}}
ENDLESS = {"inputs": CANARY, "parameters": {"max_new_tokens": 4000, "ignore_eos": True}}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
CHILDREN = ["validate", "queue", "prefill", "decode"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver over gRPC and over HTTP.

    Attributes:
        grpc, http: the endpoints.
        raw: what arrived, in the words of the wire.
    """

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self._batches: queue.SimpleQueue[trace_service_pb2.ExportTraceServiceRequest] = queue.SimpleQueue()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.grpc = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        collector = self

        class Receiver(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                known = self.path == "/v1/traces"
                if known:
                    collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if known else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        self._http.daemon_threads = True
        self.http = f"http://127.0.0.1:{self._http.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def Export(self, request, context):  # noqa: N802 - the service's name for it
        self.take(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        self.raw.append(request.SerializeToString())
        self._batches.put(request)

    def wait_trace(self, root: str) -> "Trace":
        """The next trace whose outermost span has that name."""
        limit = time.monotonic() + 20
        seen = []
        while (left := limit - time.monotonic()) > 0:
            try:
                batch = self._batches.get(timeout=left)
            except queue.Empty:
                break
            for resource in batch.resource_spans:
                about = attributes(resource.resource.attributes)
                seen += [(about, span) for scope in resource.scope_spans for span in scope.spans]
            roots = [(about, span) for about, span in seen if span.name == root]
            if roots:
                about, span = roots[0]
                return Trace(about, span, [other for _, other in seen if other.parent_span_id == span.span_id])
        raise AssertionError(f"no trace named {root}, only {[span.name for _, span in seen]}")

    def stop(self) -> None:
        self._server.stop(0).wait()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class Trace:
    def __init__(self, about: dict, root: trace_pb2.Span, children: list[trace_pb2.Span]) -> None:
        self.about = about
        self.root = root
        self.children = children
        self.attributes = attributes(root.attributes)

    def assert_nested(self, names: list[str]) -> None:
        """The children have these names, stand inside the root, and none begins before the one before it ended."""
        assert [child.name for child in self.children] == names
        moment = self.root.start_time_unix_nano
        for child in self.children:
            assert child.trace_id == self.root.trace_id
            assert moment <= child.start_time_unix_nano <= child.end_time_unix_nano
            moment = child.end_time_unix_nano
        assert moment <= self.root.end_time_unix_nano


def attributes(pairs) -> dict:
    values = {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
    return {
        name: [item.string_value for item in value.values] if hasattr(value, "values") else value
        for name, value in values.items()
    }


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module", params=["grpc", "http"])
def traced(request, collector, model_directory):
    from server.conftest import SMALL, Server

    server = Server(
        [
            f"--model-id={model_directory}",
            *SMALL,
            f"--otlp-endpoint={getattr(collector, request.param)}",
            "--otlp-service-name=weir-under-test",
            "--json-output",
            "--log-level=debug",
        ],
        SOON,
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def finished(server, **wanted: object) -> dict:
    """The next log line of a finished request that has these fields."""
    for _ in range(100):
        line = json.loads(server.wait_line(r'"request_id"').string)
        if all(line.get(name) == value for name, value in wanted.items()):
            return line
    raise AssertionError(f"nothing was logged with {wanted}")


def test_a_request_is_one_trace_from_http_to_decode(traced, collector):
    before = time.time_ns()
    assert traced.post("/generate", DRAWN, headers={"x-request-id": "call-1"}).status_code == 200
    trace = collector.wait_trace("generate")
    trace.assert_nested(CHILDREN)
    assert trace.about["service.name"] == "weir-under-test"
    assert trace.root.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert not trace.root.parent_span_id
    assert before <= trace.root.start_time_unix_nano <= trace.root.end_time_unix_nano <= time.time_ns()
    known = trace.attributes
    assert known["http.request.method"] == "POST"
    assert known["http.route"] == "/generate"
    assert known["http.response.status_code"] == 200
    assert known["request_id"] == "call-1"
    assert known["gen_ai.usage.input_tokens"] == len(CANARY)
    assert known["gen_ai.usage.output_tokens"] == 6
    assert known["gen_ai.response.finish_reasons"] == ["length"]
    assert known["seed"] == "7"
    assert json.loads(known["parameters"]) == {"do_sample": True, "seed": 7, "max_new_tokens": 6}
    seconds = (trace.root.end_time_unix_nano - trace.root.start_time_unix_nano) / 1e9
    assert known["total_time"] == pytest.approx(seconds, abs=1e-6)
    parts = known["validation_time"] + known["queue_time"] + known["inference_time"]
    assert 0 < parts <= known["total_time"]
    assert known["time_per_token"] == pytest.approx(known["inference_time"] / 6)

    line = finished(traced, request_id="call-1")
    assert line["trace_id"] == trace.root.trace_id.hex()
    assert (line["level"], line["message"], line["handler"], line["status"]) == ("INFO", "Success", "generate", 200)
    assert (line["seed"], line["prompt_tokens"], line["generated_tokens"]) == (7, len(CANARY), 6)
    assert line["total_time"] == pytest.approx(known["total_time"], abs=1e-5)


def test_a_stream_is_traced_to_its_end(traced, collector):
    body = traced.post("/generate_stream", SHORT).text
    assert body.count("data:") == 6
    trace = collector.wait_trace("generate_stream")
    trace.assert_nested(CHILDREN)
    assert trace.attributes["gen_ai.usage.output_tokens"] == 6
    decode = trace.children[-1]
    assert decode.end_time_unix_nano > decode.start_time_unix_nano


def test_chat_has_a_name_of_its_own(traced, collector):
    body = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 3, "model": "x"}
    assert traced.post("/v1/chat/completions", body).status_code == 200
    trace = collector.wait_trace("chat_completions")
    trace.assert_nested(CHILDREN)
    assert trace.attributes["gen_ai.operation.name"] == "chat"


def test_every_sample_of_best_of_has_its_own_spans(traced, collector):
    asked = {"inputs": CANARY, "parameters": {"max_new_tokens": 3, "best_of": 2, "do_sample": True}}
    assert traced.post("/generate", asked).status_code == 200
    children = collector.wait_trace("generate").children
    assert sorted(child.name for child in children) == sorted(["validate", *CHILDREN[1:] * 2])
    samples = {attributes(child.attributes)["sample"] for child in children if child.name == "decode"}
    assert samples == {0, 1}


def test_traceparent_is_continued(traced, collector):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    assert traced.post("/generate", SHORT, headers=headers).status_code == 200
    trace = collector.wait_trace("generate")
    assert trace.root.trace_id.hex() == TRACE
    assert trace.root.parent_span_id.hex() == PARENT
    assert trace.root.trace_state == "vendor=1"
    trace.assert_nested(CHILDREN)


def test_a_client_that_does_not_sample_is_not_traced_but_logged(traced, collector):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00", "x-request-id": "unsampled"}
    assert traced.post("/generate", SHORT, headers=headers).status_code == 200
    assert finished(traced, request_id="unsampled")["trace_id"] == TRACE
    assert traced.post("/generate", SHORT).status_code == 200
    assert collector.wait_trace("generate").root.trace_id.hex() != TRACE


def test_nonsense_in_traceparent_begins_a_new_trace(traced, collector):
    assert traced.post("/generate", SHORT, headers={"traceparent": "00-nonsense"}).status_code == 200
    trace = collector.wait_trace("generate")
    assert not trace.root.parent_span_id


def test_failures_say_why(traced, collector):
    refused = {"inputs": CANARY, "parameters": {"max_new_tokens": 0}}
    assert traced.post("/generate", refused, headers={"x-request-id": "refused"}).status_code == 422
    trace = collector.wait_trace("generate")
    trace.assert_nested(["validate"])
    assert trace.attributes["error.type"] == "validation"
    assert trace.root.status.code == trace_pb2.Status.STATUS_CODE_UNSET  # it was the client's fault
    line = finished(traced, request_id="refused")
    assert (line["level"], line["message"], line["error"], line["status"]) == ("INFO", "Failure", "validation", 422)


def test_a_client_that_leaves_ends_its_trace(traced, collector):
    with traced.post("/generate_stream", ENDLESS, stream=True) as stream:
        next(stream.iter_content(1))
    trace = collector.wait_trace("generate_stream")
    trace.assert_nested(CHILDREN)
    assert trace.attributes["error.type"] == "dropped"
    assert 0 < trace.attributes["gen_ai.usage.output_tokens"] < 4000


def test_no_prompt_is_in_any_log_or_span(traced, collector):
    """After all the tests above: each of their prompts held the canary."""
    grammar = {"type": "regex", "value": CANARY}
    traced.post("/generate", {"inputs": "x", "parameters": {"stop": [CANARY], "max_new_tokens": 3}})
    traced.post("/generate", {"inputs": "x", "parameters": {"grammar": grammar, "max_new_tokens": 3}})
    traced.post("/generate", {"inputs": CANARY * 1000})
    traced.post("/tokenize", {"inputs": CANARY}, headers={"x-request-id": "tokenized"})
    requests.post(
        traced.url + "/generate", data=f'{{"inputs": "{CANARY}"', headers={"content-type": "application/json"}
    )
    requests.post(traced.url + f"/generate?{CANARY}", data=CANARY)
    collector.wait_trace("tokenize")
    finished(traced, request_id="tokenized")
    assert len(traced.lines) > 5
    assert not [line for line in traced.lines if CANARY in line]
    assert not [raw for raw in collector.raw if CANARY.encode() in raw]


def test_what_is_left_is_sent_at_the_end(start, collector):
    server = start(f"--otlp-endpoint={collector.grpc}", "--otlp-service-name=leaving").wait_ready()
    assert server.post("/generate", SHORT).status_code == 200  # within the 5 s for which spans are gathered
    server.signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert collector.wait_trace("generate").about["service.name"] == "leaving"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://127.0.0.1:9/v1/traces", "http://192.0.2.1:4317"])
def test_a_dead_collector_does_no_harm(start, endpoint):
    server = start(f"--otlp-endpoint={endpoint}", environ=SOON).wait_ready()
    family = server.processes()
    for _ in range(20):
        assert server.post("/generate", SHORT).status_code == 200
    assert server.get("/health").status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait_exit() == 0  # which waits for half a minute at most; a collector may cost 2 s of it
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_stream_that_outlives_the_device_is_one_trace(start, collector):
    """And a process can be started from a worker that has gRPC's threads in it."""
    server = start(f"--otlp-endpoint={collector.grpc}", "--otlp-service-name=outlived", environ=SOON).wait_ready()
    assert server.post("/generate", SHORT).status_code == 200
    assert collector.wait_trace("generate").about["service.name"] == "outlived"
    asked = {"inputs": CANARY, "parameters": {"max_new_tokens": 1000, "ignore_eos": True}}
    with server.post("/generate_stream", asked, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        device = next(process for process in server.processes() if "serving.runner.process" in process.cmdline())
        device.kill()
        assert sum(line.startswith(b"data:") for line in lines) == 999
    trace = collector.wait_trace("generate_stream")
    trace.assert_nested(CHILDREN)
    assert trace.attributes["gen_ai.usage.output_tokens"] == 1000
    assert "error.type" not in trace.attributes


def test_an_endpoint_that_is_none_is_refused_in_one_line(start):
    server = start("--otlp-endpoint=collector at home")
    assert server.wait_exit() != 0
    assert re.search(r"--otlp-endpoint must be like http://localhost:4317", server.lines[-1])


def test_without_an_endpoint_nothing_of_opentelemetry_is_loaded(server):
    worker = server.processes()[1]
    assert server.post("/generate", SHORT).status_code == 200
    assert not [mapped.path for mapped in worker.memory_maps() if "grpc" in mapped.path]
