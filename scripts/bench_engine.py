"""Measure the engine and its runner on whole workloads, side by side with transformers' `generate`.

It must not know HTTP (that is bench_server), nor how a step is made.
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scripts.bench import report
from scripts.bench.models import SHAPES, write_checkpoint
from scripts.bench.neighbours import Neighbours
from scripts.bench.offline import OfflineEngine, Outcome
from scripts.bench.peer import Generate
from scripts.bench.report import Spread
from scripts.bench.workloads import WORKLOADS, Job, longest
from serving.runner.frames import RunnerOptions
from serving.runner.memory import cpu_count
from serving.weights.model_config import ModelConfig

DESCRIPTION = """\
Run whole workloads through the engine and its runner process, and through transformers' `generate` (bfloat16, one
static batch padded on the left) with the same weights in the same run. The two take turns.

{workloads}

tok/s       the tokens that were wanted, divided by the time from handing all requests over to the last token
ratio       ours to the peer's: the median of the ratios of turns that stood side by side (least..most)
device      share of our time in which the runner process computed; the rest is the engine's own
agreement   share of our tokens equal to the peer's at the same place (greedy). A random model in bfloat16 has many
            near ties, and one that falls the other way changes all that follows: a report, not a test

Every repetition has new prompts of the same lengths, so the prefix cache knows nothing of earlier ones: what (c)
shares it shares within its own batch. One unmeasured repetition comes first. The peer runs in this process.
"""
EPILOG = """\
examples:
  python -m scripts.bench_engine                                      a, b and c on the random 125M model
  python -m scripts.bench_engine --workloads a --repeats 5
  python -m scripts.bench_engine --shape 1.1b --workloads ab
  python -m scripts.bench_engine --model-dir DIR --dtype float32      a local checkpoint instead of random weights
  python -m scripts.bench_engine --without-peer                       ours alone, when only that changed
"""


@dataclass(slots=True)
class Measured:
    """The turns of one workload."""

    ours: list[Outcome] = field(default_factory=list)
    peer: list[Outcome] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code."""
    asked = _arguments(argv)
    torch.set_num_threads(cpu_count())
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = asked.model_dir or Path(temporary)
        if asked.model_dir is None:
            print(f"writing a random {asked.shape} model", file=sys.stderr)
            write_checkpoint(model_dir, SHAPES[asked.shape])
        record = _compare(asked, model_dir)
    _print(record)
    report.finish(record)
    return 0


def _compare(asked: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    vocab_size = ModelConfig.load(model_dir).vocab_size
    with OfflineEngine(model_dir, _options(asked, model_dir, vocab_size)) as engine:
        peer = None if asked.without_peer else Generate(model_dir, "cpu" if engine.facts.device == "cpu" else "cuda")
        measured = {name: Measured() for name in asked.workloads}
        seeds = itertools.count(1)
        for name in asked.workloads:
            _turn(Measured(), engine, peer, _shortened(_jobs(name, next(seeds), vocab_size)))
        with Neighbours() as neighbours:
            for _ in tqdm(range(asked.repeats), desc="Measuring", unit="turn", disable=None):
                for name in asked.workloads:
                    _turn(measured[name], engine, peer, _jobs(name, next(seeds), vocab_size))
        return {
            "bench": "engine", "model": str(asked.model_dir or asked.shape), "dtype": engine.facts.dtype,
            "device": engine.facts.device, "repeats": asked.repeats,
            "peer": None if peer is None else "transformers generate bfloat16",
            "workloads": {name: _result(runs) for name, runs in measured.items()},
            "runner_peak_rss_mb": engine.peak_rss_bytes() / 1e6, "weight_mb": engine.facts.weight_bytes / 1e6,
            "kv_mb": engine.facts.kv_bytes / 1e6, "environment": report.environment(),
            "neighbour_cores": neighbours.cores,
        }  # fmt: skip


def _jobs(name: str, seed: int, vocab_size: int) -> list[Job]:
    return WORKLOADS[name].make(random.Random(seed), vocab_size)


def _shortened(jobs: Sequence[Job]) -> list[Job]:
    """For warming up: the same batch and prompts, few tokens."""
    return [Job(job.prompt, min(4, job.wanted)) for job in jobs]


def _turn(runs: Measured, engine: OfflineEngine, peer: Generate | None, jobs: list[Job]) -> None:
    runs.ours.append(engine.run(jobs))
    if peer is not None:
        runs.peer.append(peer.run(jobs))
    for outcome in (runs.ours[-1:] + runs.peer[-1:])[:2]:
        if [len(tokens) for tokens in outcome.tokens] != [job.wanted for job in jobs]:
            raise RuntimeError("not every request got the tokens it wanted: the figures would compare nothing")


def _result(runs: Measured) -> dict[str, Any]:
    ours = Spread.of([outcome.tokens_per_s for outcome in runs.ours])
    result: dict[str, Any] = {
        "tokens": sum(map(len, runs.ours[0].tokens)), "tokens_per_s": ours,
        "steps": runs.ours[-1].steps, "cached_tokens": runs.ours[-1].cached_tokens,
        "device_share": Spread.of([outcome.forward_s / outcome.elapsed_s for outcome in runs.ours]).median,
    }  # fmt: skip
    if runs.peer:
        pairs = list(zip(runs.ours, runs.peer, strict=True))
        result["peer_tokens_per_s"] = Spread.of([outcome.tokens_per_s for outcome in runs.peer])
        result["ratio"] = Spread.of([mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in pairs])
        result["agreement"] = Spread.of([_agreement(mine, theirs) for mine, theirs in pairs]).median
    return result


def _agreement(ours: Outcome, peer: Outcome) -> float:
    places = [
        mine == theirs
        for answer, other in zip(ours.tokens, peer.tokens, strict=True)
        for mine, theirs in zip(answer, other, strict=True)
    ]
    return sum(places) / len(places)


def _options(asked: argparse.Namespace, model_dir: Path, vocab_size: int) -> RunnerOptions:
    every = [_jobs(name, 0, vocab_size) for name in asked.workloads]
    return RunnerOptions(
        model_dir=str(model_dir), dtype=asked.dtype, device=asked.device, max_step_tokens=asked.max_step_tokens,
        max_rows=max(map(len, every)), max_total_tokens=max(map(longest, every)),
        # On a GPU the peer needs its weights and its cache beside ours.
        device_memory_fraction=0.4, log_level="warn",
    )  # fmt: skip


def _print(record: dict[str, Any]) -> None:
    peak, weights, kv = (record[key] for key in ("runner_peak_rss_mb", "weight_mb", "kv_mb"))
    print(f"{record['model']}, {record['dtype']} on {record['device']}; peer: {record['peer']}")
    print(f"runner's peak RSS {peak:.0f} MB (weights {weights:.0f}, KV cache {kv:.0f})")
    report.table(
        ["workload", "tok/s", "peer tok/s", "ratio", "device", "steps", "cached", "agreement"],
        [
            [
                f"({name}) {WORKLOADS[name].description}", r["tokens_per_s"], r.get("peer_tokens_per_s"),
                r.get("ratio"), r["device_share"], r["steps"], r["cached_tokens"], r.get("agreement"),
            ]
            for name, r in record["workloads"].items()
        ],
    )  # fmt: skip


def _workloads(text: str) -> str:
    if not text or set(text) - set(WORKLOADS):
        raise argparse.ArgumentTypeError(f"{text!r}: give letters out of {''.join(WORKLOADS)}")
    return text


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count = report.at_least_one
    lines = "\n".join(f"({name})  {workload.description}" for name, workload in WORKLOADS.items())
    parser = report.parser("bench_engine", DESCRIPTION.format(workloads=lines), EPILOG)
    parser.add_argument("--workloads", type=_workloads, default="abc", help="letters of workloads (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="125m", help="random weights of this shape (%(default)s)")
    parser.add_argument("--model-dir", type=Path, help="a checkpoint's directory, instead of --shape")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what computes (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="ours only (%(default)s)"
    )
    parser.add_argument("--max-step-tokens", type=count, help="our step's token budget (the runner's own choice)")
    parser.add_argument("--without-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--repeats", type=count, default=3, help="turns; at least 3 for a claim (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    report.run(main)
