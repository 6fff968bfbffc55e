"""Measure a whole server over HTTP: first tokens, gaps between tokens, throughput, and health checks meanwhile.

It must not know how the server works: only routes of its contract are used.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import string
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.bench import report
from scripts.bench.client import Address, Stream, generate_stream, ping
from scripts.bench.live_server import LiveServer, peak_rss_mb
from scripts.bench.models import SHAPES, write_checkpoint
from scripts.bench.neighbours import Neighbours
from scripts.bench.offline import OfflineEngine
from scripts.bench.report import Spread, percentile
from scripts.bench.workloads import Job
from serving.runner.frames import RunnerOptions
from serving.tokenizer import Tokenizer

DESCRIPTION = """\
Send N generations to `POST /generate_stream` and watch their tokens arrive, with `GET /ping` every 50 ms meanwhile.
Without --url a real server is started on the loopback address, with random weights or --model-dir, and ended.

open loop   requests are sent when their time comes, whether or not earlier ones are answered: all at once, or with
            --rate as a Poisson process of so many a second
TTFT        from sending a request to its first token          ITL   from one token to the next of the same stream
tok/s       tokens of all streams, from the first request sent to the last token
RSS         the most memory that the server's processes held (the runner: once it was loaded)

Every answer has exactly --output tokens (`ignore_eos`, which is ours), every prompt --prompt tokens (random words, cut
by `truncate`), and no two share a prefix. With --engine-too the same prompts also go, in turns, through the offline
engine; `server / engine` is what HTTP leaves of its speed. Client, server and engine share this machine's processors.
"""
EPILOG = """\
examples:
  python -m scripts.bench_server                                  16, then 64 streams on the random 125M model
  python -m scripts.bench_server --engine-too
  python -m scripts.bench_server --streams 200 --rate 4           arrivals of 4 a second
  python -m scripts.bench_server --url http://127.0.0.1:8080 --pid 1234
"""
PING_EVERY_S = 0.05
SPARE_TOKENS = 8
TIMES = ("ttft_ms", "itl_ms", "ping_ms")


@dataclass(slots=True)
class Measured:
    """The turns of one number of streams."""

    streams: list[list[Stream]] = field(default_factory=list)
    pings_s: list[float] = field(default_factory=list)
    pings_failed: int = 0
    engine_tokens_per_s: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code: 1 when a stream failed."""
    asked = _arguments(argv)
    with contextlib.ExitStack() as stack:
        model_dir = asked.model_dir or _random_model(asked, stack)
        address, pid = Address.of(asked.url) if asked.url else None, asked.pid
        if address is None:
            server = stack.enter_context(LiveServer(model_dir, _flags(asked)))
            address, pid = server.address, server.pid
        engine = None
        if asked.engine_too:
            engine = stack.enter_context(OfflineEngine(model_dir, _options(asked, model_dir)))
        record = _measure(asked, address, pid, engine, Tokenizer.load(model_dir) if engine else None)
    _print(record)
    report.finish(record)
    failed = {error for result in record["results"] for error in result["errors"]}
    for error in sorted(failed):
        print(f"error: {error}", file=sys.stderr)
    return 1 if failed else 0


def _random_model(asked: argparse.Namespace, stack: contextlib.ExitStack) -> Path:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if not asked.url:
        print(f"writing a random {asked.shape} model", file=sys.stderr)
        write_checkpoint(directory, SHAPES[asked.shape])
    return directory


def _measure(
    asked: argparse.Namespace, address: Address, pid: int | None, engine: OfflineEngine | None,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:  # fmt: skip
    measured = {count: Measured() for count in asked.streams}
    sources = (random.Random(seed) for seed in itertools.count())
    for count in asked.streams:  # not measured: first meetings with kernels, connections and allocators
        _turn(asked, address, engine, tokenizer, Measured(), count, next(sources))
    with Neighbours(also_ours=asked.pid) as neighbours:
        for _ in tqdm(range(asked.repeats), desc="Measuring", unit="turn", disable=None):
            for count, runs in measured.items():
                _turn(asked, address, engine, tokenizer, runs, count, next(sources))
    return {
        "bench": "server", "model": str(asked.url or asked.model_dir or asked.shape), "dtype": asked.dtype,
        "prompt": asked.prompt, "output": asked.output, "rate": asked.rate, "repeats": asked.repeats,
        "results": [_result(count, runs, asked.output) for count, runs in measured.items()],
        "peak_rss_mb": peak_rss_mb(pid) if pid is not None else None, "environment": report.environment(),
        "neighbour_cores": neighbours.cores,
    }  # fmt: skip


def _turn(
    asked: argparse.Namespace, address: Address, engine: OfflineEngine | None, tokenizer: Tokenizer | None,
    runs: Measured, count: int, source: random.Random,
) -> None:  # fmt: skip
    texts = [_text(source, asked.prompt + SPARE_TOKENS) for _ in range(count)]
    delays = list(_delays(source, count, asked.rate))
    asyncio.run(_send(asked, address, runs, texts, delays))
    if engine is not None and tokenizer is not None:
        jobs = [Job(tokenizer.encode(text)[-asked.prompt :], asked.output) for text in texts]
        runs.engine_tokens_per_s.append(engine.run(jobs).tokens_per_s)


async def _send(
    asked: argparse.Namespace, address: Address, runs: Measured, texts: Sequence[str], delays: Sequence[float]
) -> None:
    pinging = asyncio.create_task(_ping_often(address, runs))
    try:
        coming = (_send_one(asked, address, text, delay) for text, delay in zip(texts, delays, strict=True))
        runs.streams.append(list(await asyncio.gather(*coming)))
    finally:
        pinging.cancel()
        await asyncio.gather(pinging, return_exceptions=True)


async def _send_one(asked: argparse.Namespace, address: Address, text: str, delay_s: float) -> Stream:
    await asyncio.sleep(delay_s)
    parameters = {"max_new_tokens": asked.output, "truncate": asked.prompt, "ignore_eos": True}
    return await generate_stream(address, {"inputs": text, "parameters": parameters}, asked.api_key)


async def _ping_often(address: Address, runs: Measured) -> None:
    while True:
        try:
            elapsed_s, status = await ping(address)
        except (OSError, EOFError, ValueError):
            runs.pings_failed += 1
        else:
            runs.pings_s.append(elapsed_s)
            runs.pings_failed += status != 200
        await asyncio.sleep(PING_EVERY_S)


def _text(source: random.Random, words: int) -> str:
    """Words of four letters: one token each for a random model's tokenizer, at least one for any other."""
    return "".join(" " + "".join(source.choices(string.ascii_lowercase, k=4)) for _ in range(words))


def _delays(source: random.Random, count: int, rate: float | None) -> Iterator[float]:
    """Seconds from now until each request is sent."""
    at = 0.0
    for _ in range(count):
        yield at
        at += source.expovariate(rate) if rate else 0.0


def _result(count: int, runs: Measured, output: int) -> dict[str, Any]:
    every = [stream for turn in runs.streams for stream in turn]
    speeds = [_tokens_per_s(turn) for turn in runs.streams]
    firsts = [stream.first_token_s * 1e3 for stream in every if stream.arrivals]
    gaps = [gap * 1e3 for stream in every for gap in stream.gaps_s]
    pings = [seconds * 1e3 for seconds in runs.pings_s]
    short = [
        f"{len(s.arrivals)} tokens instead of {output}" for s in every if len(s.arrivals) != output and not s.error
    ]
    result: dict[str, Any] = {
        "streams": count, "tokens_per_s": Spread.of(speeds),
        "ttft_ms": {"p50": percentile(firsts, 50), "p99": percentile(firsts, 99)},
        "itl_ms": {"p50": percentile(gaps, 50), "p99": percentile(gaps, 99)},
        "ping_ms": {"p50": percentile(pings, 50), "p99": percentile(pings, 99), "count": len(pings)},
        "pings_failed": runs.pings_failed,
        "errors": [*short, *(stream.error for stream in every if stream.error is not None)],
    }  # fmt: skip
    if runs.engine_tokens_per_s:
        result["engine_tokens_per_s"] = Spread.of(runs.engine_tokens_per_s)
        pairs = zip(speeds, runs.engine_tokens_per_s, strict=True)
        result["ratio"] = Spread.of([served / offline for served, offline in pairs])
    return result


def _tokens_per_s(turn: Sequence[Stream]) -> float:
    arrivals = [at for stream in turn for at in stream.arrivals]
    if not arrivals:
        return 0.0
    return len(arrivals) / (max(arrivals) - min(stream.sent for stream in turn))


def _flags(asked: argparse.Namespace) -> list[str]:
    """The server's flags: room for every stream at once, and nothing else that an operator would not say."""
    flags = {
        "max-concurrent-requests": max(asked.streams), "max-batch-size": max(asked.streams),
        "max-input-tokens": asked.prompt + SPARE_TOKENS, "max-total-tokens": _longest(asked),
        "dtype": asked.dtype, "device": asked.device, "log-level": "warn", "graceful-termination-timeout": 1,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in flags.items()]


def _options(asked: argparse.Namespace, model_dir: Path) -> RunnerOptions:
    """The offline engine's runner: the same limits as the server's."""
    return RunnerOptions(
        model_dir=str(model_dir), dtype=asked.dtype, device=asked.device, max_rows=max(asked.streams),
        max_total_tokens=_longest(asked), device_memory_fraction=0.4, log_level="warn",
    )  # fmt: skip


def _longest(asked: argparse.Namespace) -> int:
    return int(asked.prompt + SPARE_TOKENS + asked.output)


def _print(record: dict[str, Any]) -> None:
    rate = f"{record['rate']} requests/s" if record["rate"] else "all at once"
    peaks = ", ".join(f"{kind} {mb:.0f}" for kind, mb in (record["peak_rss_mb"] or {}).items()) or "not known"
    print(f"{record['model']}, {record['prompt']} in, {record['output']} out, {rate}; peak RSS in MB: {peaks}")
    report.table(
        ["streams", "tok/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "ping p50 ms", "p99", "pings failed", "errors",
         "engine tok/s", "server / engine"],
        [
            [
                r["streams"], r["tokens_per_s"], *(r[key][p] for key in TIMES for p in ("p50", "p99")),
                r["pings_failed"], len(r["errors"]), r.get("engine_tokens_per_s"), r.get("ratio"),
            ]
            for r in record["results"]
        ],
    )  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count = report.at_least_one
    parser = report.parser("bench_server", DESCRIPTION, EPILOG)
    parser.add_argument("--url", help="a running server, http://HOST:PORT, instead of starting one")
    parser.add_argument("--pid", type=count, help="with --url: its arbiter's process id, to report its memory")
    parser.add_argument("--api-key", help="with --url: sent as a bearer token")
    parser.add_argument("--shape", choices=SHAPES, default="125m", help="random weights of this shape (%(default)s)")
    parser.add_argument("--model-dir", type=Path, help="a checkpoint's directory, instead of --shape")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what computes (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="computing type (%(default)s)"
    )
    parser.add_argument("--streams", type=count, nargs="+", default=[16, 64], help="requests in a turn (%(default)s)")
    parser.add_argument("--prompt", type=count, default=128, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--output", type=count, default=64, help="tokens of each answer (%(default)s)")
    parser.add_argument("--rate", type=float, help="arrivals a second, as a Poisson process (all at once)")
    parser.add_argument("--engine-too", action="store_true", help="the same work through the offline engine, in turns")
    parser.add_argument("--repeats", type=count, default=3, help="turns; at least 3 for a claim (%(default)s)")
    asked = parser.parse_args(argv)
    if asked.engine_too and (asked.rate or (asked.url and not asked.model_dir)):
        parser.error("--engine-too needs the served model's --model-dir, and all requests at once (no --rate)")
    if asked.pid and not asked.url:
        parser.error("--pid is for a server given by --url")
    return asked


if __name__ == "__main__":
    report.run(main)
