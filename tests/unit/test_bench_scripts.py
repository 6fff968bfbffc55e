"""The benchmarks run, and end with one JSON line that says what a reader of bench/*.json expects."""

import asyncio
import http.server
import json
import threading
import time

import pytest
import torch

from scripts import bench_adapters, bench_engine, bench_linear, bench_server, bench_step, measure_loading
from scripts.bench import architectures
from scripts.bench.client import Address, generate_stream
from scripts.bench.report import percentile

BENCHMARKS = [bench_step, bench_adapters, bench_linear, bench_engine, bench_server, measure_loading]
TOKENS = 4
FIRST_TOKEN_S, GAP_S = 0.06, 0.02


@pytest.fixture(autouse=True)
def own_process_untouched(monkeypatch):
    """malloc's settings cannot be taken back, and other tests measure this process's memory."""
    for benchmark in (bench_step, bench_adapters, bench_linear):
        monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class StubServer(http.server.BaseHTTPRequestHandler):
    """A server whose tokens come at known times; `broken` ends its stream as TGI does, with an event."""

    protocol_version = "HTTP/1.1"
    broken = False

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        self.began.append(time.monotonic())
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        time.sleep(FIRST_TOKEN_S)
        for index in range(TOKENS):
            self._chunk(b'data: {"index":%d,"token"' % index)  # an event in two chunks is still one event
            self._chunk(b":{}}\n\n")
            time.sleep(GAP_S)
        self._chunk(b":\n\n")
        if self.broken:
            self._chunk(b'data: {"error":"Incomplete generation stream","error_type":"x"}\n\n')
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, content):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))

    def log_message(self, *_):
        """Silence."""


@pytest.fixture
def stub():
    """A class to adjust, and the URL at which it answers."""
    handler = type("Stub", (StubServer,), {"bodies": [], "began": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_help_teaches_by_examples(benchmark, capsys):
    with pytest.raises(SystemExit) as left:
        benchmark.main(["--help"])
    assert left.value.code == 0
    name = benchmark.__name__
    assert capsys.readouterr().out.count(f"  python -m {name}") >= 3


def test_step_reports_every_case_beside_the_copy(capsys):
    tiny = ["--shape", "tiny", "--device", "cpu", "--threads", "1", "--steps", "2", "--repeats", "3"]
    assert bench_step.main([*tiny, "--batch", "1", "3", "--context", "20", "--prefill", "32"]) == 0
    record = last_line(capsys)
    assert [(case["batch"], case["context"]) for case in record["decode"]] == [(1, 20), (3, 20)]
    assert [case["tokens"] for case in record["prefill"]] == [32]
    for case in record["decode"]:
        step = case["step_ms"]
        assert 0 < step["min"] <= step["median"] <= step["max"]
        assert case["tokens_per_s"] == pytest.approx(case["batch"] / step["median"] * 1e3, rel=1e-3)
        assert case["share_of_copy"] == pytest.approx(case["all_gb_per_s"] / record["copy_gb_per_s"], rel=1e-3)
    # q, k, v and out of two layers; gate, up and down; the head: two bytes each
    assert record["weight_bytes_per_step"] == 2 * (2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 512 * 64)
    assert record["environment"]["torch"] == torch.__version__
    assert record["neighbour_cores"] >= 0


def test_adapters_are_compared_with_the_model_as_it_is(capsys):
    tiny = ["--shape", "tiny", "--device", "cpu", "--threads", "1", "--steps", "2", "--repeats", "3"]
    assert bench_adapters.main([*tiny, "--rank", "4", "--batch", "1", "3", "--adapters", "0", "2"]) == 0
    record = last_line(capsys)
    assert [(case["batch"], case["adapters"]) for case in record["results"]] == [(1, 0), (3, 0), (3, 2)]
    assert all(0 < case["ratio"]["min"] <= case["ratio"]["max"] for case in record["results"])
    assert record["rank"] == 4


def test_step_counts_no_weight_twice(capsys):
    bench_step.main(["--shape", "tiny", "--device", "cpu", "--threads", "1", "--repeats", "1", "--prefill"])
    record = last_line(capsys)
    table, norms = 2 * 512 * 64, 2 * 5 * 64
    assert record["weight_bytes_kept"] == record["weight_bytes_per_step"] + table + norms
    assert record["prefill"] == []


def test_step_compares_architectures_turn_beside_turn(capsys):
    few = [
        "--batch",
        "1",
        "4",
        "--context",
        "16",
        "--steps",
        "1",
        "--repeats",
        "3",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert bench_step.main(["--architectures", "gpt2", "qwen3_moe", *few]) == 0
    results = last_line(capsys)["results"]
    assert [(case["architecture"], case["batch"]) for case in results] == [
        ("gpt2", 1), ("gpt2", 4), ("qwen3_moe", 1), ("qwen3_moe", 4)
    ]  # fmt: skip
    for case in results:
        assert 0 < case["ratio"]["min"] <= case["ratio"]["median"] <= case["ratio"]["max"]
        assert case["cpu_ratio"]["median"] > 0
    weights = [case["weights"] for case in results]
    assert weights[:3] == pytest.approx([1, 1, 1], abs=0.01)
    assert weights[3] > 1.5  # four tokens choose more experts than one


@pytest.mark.parametrize("name", architectures.NAMES)
def test_architectures_are_compared_at_one_size(name, tmp_path):
    weights = []
    for model in ("llama", name):
        architectures.write_config(tmp_path, model, positions=64)
        weights.append(architectures.StepWeights.of(tmp_path).read(1))
    assert weights[1] == pytest.approx(weights[0], rel=0.06)


def test_linear_names_the_fastest_kernel_for_every_number_of_rows(capsys):
    shape = ["--shapes", "64x48", "--working-set", "1", "--dtypes", "float32", "--threads", "1", "--repeats", "3"]
    assert bench_linear.main([*shape, "--rows", "1", "8", "--unpack-from", "8"]) == 0
    few, many = last_line(capsys)["results"]
    assert set(few["ms"]) == {"linear", "packed"}
    assert set(many["ms"]) == set(many["weights_gb_per_s"]) == {"linear", "packed", "unpack"}
    for result in (few, many):
        ratios = {name: speedup["median"] for name, speedup in result["speedup"].items()} | {"linear": 1.0}
        assert ratios[result["fastest"]] == max(ratios.values())
        assert result["difference"] < 1e-5


def test_engine_gives_every_request_its_tokens_and_agrees_with_the_peer(capsys):
    assert bench_engine.main(["--shape", "tiny", "--device", "cpu", "--workloads", "s", "--repeats", "1"]) == 0
    record = last_line(capsys)
    small = record["workloads"]["s"]
    assert small["tokens"] == 3 + 4 + 5
    assert small["ratio"]["median"] == pytest.approx(
        small["tokens_per_s"]["median"] / small["peer_tokens_per_s"]["median"], rel=1e-3
    )
    # One near tie may fall the other way; another model, or a shifted position, agrees nowhere.
    assert small["agreement"] >= 0.5
    assert record["runner_peak_rss_mb"] > record["weight_mb"]


def test_loading_is_watched_from_outside_rank_by_rank(tmp_path, capsys):
    small = ["--size", "30", "--vocab", "512", "--cases", "float32", "ranks", "--directory", str(tmp_path)]
    assert measure_loading.main(small) in (0, 1)  # what a process takes beside weights counts at this size
    wide, first, second = last_line(capsys)["results"]
    assert (wide["rank"], first["rank"], second["rank"]) == ("0 of 1", "0 of 2", "1 of 2")
    assert wide["kept_mb"] == pytest.approx(15, rel=0.2), "float32 is kept in half its bytes"
    assert first["kept_mb"] == second["kept_mb"] == pytest.approx(15, rel=0.2), "two ranks keep a half each"
    for result in (wide, first, second):
        assert result["peak_mb"] >= result["end_mb"] > result["kept_mb"]
        assert result["samples"] > 10
        assert result["allowed_mb"] == pytest.approx(1.1 * result["kept_mb"] + result["largest_tensor_mb"], rel=1e-3)
        assert result["within"] == (result["peak_mb"] <= result["allowed_mb"])
    assert list(tmp_path.iterdir()) == []


def test_server_times_first_tokens_and_gaps(stub, capsys):
    handler, url = stub
    options = ["--streams", "3", "--prompt", "5", "--output", str(TOKENS), "--repeats", "3"]
    assert bench_server.main(["--url", url, *options]) == 0
    record = last_line(capsys)
    (result,) = record["results"]
    assert result["errors"] == []
    assert result["ttft_ms"]["p50"] >= FIRST_TOKEN_S * 1e3
    assert result["itl_ms"]["p99"] >= result["itl_ms"]["p50"] >= GAP_S * 0.9e3
    assert 0 < result["tokens_per_s"]["median"] < 3 * TOKENS / FIRST_TOKEN_S
    assert result["ping_ms"]["count"] > 0
    assert result["pings_failed"] == 0
    assert len(handler.bodies) == 3 * 4  # one turn is not measured
    assert len({body["inputs"] for body in handler.bodies}) == len(handler.bodies)
    assert handler.bodies[0]["parameters"] == {"max_new_tokens": TOKENS, "truncate": 5, "ignore_eos": True}


def test_server_fails_when_a_stream_ends_early(stub, capsys):
    handler, url = stub
    handler.broken = True
    assert bench_server.main(["--url", url, "--streams", "1", "--output", str(TOKENS), "--repeats", "1"]) == 1
    (result,) = last_line(capsys)["results"]
    assert "Incomplete generation stream" in result["errors"][0]


def test_server_spaces_arrivals_by_the_rate(stub, capsys):
    handler, url = stub
    bench_server.main(["--url", url, "--streams", "6", "--output", str(TOKENS), "--repeats", "1", "--rate", "10"])
    assert last_line(capsys)["rate"] == 10
    assert handler.began[-1] - handler.began[-6] > 0.2  # the seed's five gaps; at once, milliseconds


def test_client_reports_a_server_that_is_not_there():
    stream = asyncio.run(generate_stream(Address("127.0.0.1", 1), {"inputs": "x"}))
    assert stream.error is not None
    assert stream.arrivals == []


@pytest.mark.parametrize(("percent", "value"), [(50, 2), (75, 3), (99, 4), (0, 1)])
def test_percentiles_are_values_that_occurred(percent, value):
    assert percentile([4, 1, 3, 2], percent) == value


def test_percentile_of_nothing_is_none():
    assert percentile([], 50) is None
