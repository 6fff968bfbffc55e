"""Measure the runner alone: how long a decoding step and a prompt's chunk take, beside what the memory allows.

It must not know the engine: plans are written here by hand.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scripts.bench import architectures, report
from scripts.bench.models import SHAPES, Traffic, write_config
from scripts.bench.neighbours import Neighbours
from scripts.bench.report import Spread
from scripts.bench.steps import Decode, Prefill, StepMeter
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner
from serving.runner.memory import cpu_count, keep_freed_memory
from serving.runner.model_runner import ModelRunner
from serving.runner.sizing import BLOCK_SIZE
from serving.weights.model_config import ModelConfig

DESCRIPTION = """\
Measure one device's steps: no engine, no HTTP, random weights unless --model-dir is given.

decode   B sequences with C tokens behind them each choose one more token. Printed beside the time: tokens/s, the
         rate at which that reads the weights (GB/s), the same with the keys and values, and that rate as a share of
         what a plain copy reaches on the same device in the same run (`of copy`). At small batches the share is the
         figure to judge by: a step cannot be faster than its weights can be read. A copy counts what it reads and
         writes; pure reading can be faster, so a share above 1 is possible on a CPU.
prefill  one sequence's first T tokens in one step: tokens/s, and TFLOP/s of the matrix products.

All cases and the copy take turns; every figure is the median of --repeats turns, with the least and most beside it.

--architectures compares decoding steps of several architectures of one small shape (768 hidden, 4 layers, 12 heads, as
many weights) instead. Every turn of one stands beside a turn of Llama: `/ Llama` is the median of the ratios of such
pairs, of which either comes first by turns (Llama's own is another copy of it: what is left there is noise). `processor
time` is the same of the time that this process's threads were busy, which neighbours disturb less, and `weights` the
ratio of the weights that a step reads: a mixture reads those of all experts that a batch chose.
"""
EPILOG = """\
examples:
  python -m scripts.bench_step                                   the 125M shape: batches 1, 16, 64, context 256
  python -m scripts.bench_step --shape 1.1b --batch 1 4 16 --context 128 1024
  python -m scripts.bench_step --shape 8b --device cuda --batch 1 8 64 256 --context 512 1024 --prefill 4096
  python -m scripts.bench_step --architectures all --repeats 15  what each architecture costs beside Llama
  python -m scripts.bench_step --model-dir DIR --dtype float32   a real checkpoint instead of random weights
"""
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
COPIES = 5
GPU_SHARE = 0.9  # the rest is for the copy
LLAMAS = 3


class CopyMeter:
    """Measures a plain copy: the memory's speed as any program meets it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        half = COPY_BYTES[device.type] // 2
        self._source = torch.ones(half, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.bytes_per_s: list[float] = []

    def measure(self) -> None:
        """One turn."""
        self._target.copy_(self._source)
        self._wait()
        begun = time.perf_counter()
        for _ in range(COPIES):
            self._target.copy_(self._source)
        self._wait()
        self.bytes_per_s.append(COPIES * 2 * self._source.nbytes / (time.perf_counter() - begun))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code."""
    asked = _arguments(argv)
    keep_freed_memory()
    torch.set_num_threads(asked.threads or cpu_count())
    if asked.architectures:
        return _compare(asked)
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = asked.model_dir or Path(temporary)
        if asked.model_dir is None:
            write_config(model_dir, SHAPES[asked.shape])
        config = ModelConfig.load(model_dir)
        runner = load_runner(_options(asked, model_dir, config))
    meter = StepMeter(runner, asked.steps)
    decodes = [Decode(batch, context) for batch in asked.batch for context in asked.context]
    prefills = [Prefill(tokens) for tokens in asked.prefill]
    for case in [case for case in decodes if not meter.fits(case.batch, case.context + asked.steps + 1)]:
        print(f"left out: {case.batch} sequences of {case.context} tokens do not fit the KV cache", file=sys.stderr)
        decodes.remove(case)
    copy = CopyMeter(torch.device("cpu" if runner.facts.device == "cpu" else "cuda"))
    with Neighbours() as neighbours:
        for _ in tqdm(range(asked.repeats), desc="Measuring", unit="turn", disable=None):
            for decode in decodes:
                meter.decode(decode)
            for prefill in prefills:
                meter.prefill(prefill)
            copy.measure()
    record = _record(asked, runner, config, decodes, prefills, Spread.of(copy.bytes_per_s))
    _print(record)
    report.finish(record | {"neighbour_cores": neighbours.cores})
    runner.close()
    return 0


def _compare(asked: argparse.Namespace) -> int:
    """Measure architectures beside Llama and report. Returns the exit code."""
    names = architectures.NAMES if "all" in asked.architectures else list(dict.fromkeys(asked.architectures))
    # Where a model came to lie in memory can make it a fifth slower or faster: Llama is there several times, in turn.
    loaded = [
        _architecture(asked, name)
        for name in tqdm(["llama"] * LLAMAS + list(names), desc="Loading", unit="model", disable=None)
    ]
    weights = {name: step_weights for name, (_, step_weights) in zip(["llama"] * LLAMAS + names, loaded, strict=True)}
    llamas = [meter for meter, _ in loaded[:LLAMAS]]
    meters = {name: meter for name, (meter, _) in zip(names, loaded[LLAMAS:], strict=True)}
    cases = [(name, batch, context) for name in names for batch in asked.batch for context in asked.context]
    turns = {case: (Decode(*case[1:]), Decode(*case[1:])) for case in cases}
    with Neighbours() as neighbours:
        for turn in tqdm(range(asked.repeats), desc="Measuring", unit="turn", disable=None):
            for (name, *_), (own, llama) in turns.items():
                pair = [(llamas[turn % LLAMAS], llama), (meters[name], own)]
                # Who comes first pays for what the pair before left in the caches.
                for meter, case in pair if turn % 2 else reversed(pair):
                    meter.decode(case)
    results = [
        {
            "architecture": name, "batch": batch, "context": context,
            "step_ms": Spread.of([s * 1e3 for s in own.step_s]),
            "ratio": Spread.of([a / b for a, b in zip(own.step_s, llama.step_s, strict=True)]),
            "cpu_ratio": Spread.of([a / b for a, b in zip(own.cpu_s, llama.cpu_s, strict=True)]),
            "weights": weights[name].read(batch) / weights["llama"].read(batch), "why": architectures.WHY.get(name, ""),
        }
        for (name, batch, context), (own, llama) in turns.items()
    ]  # fmt: skip
    report.table(
        ["architecture", "batch", "context", "step ms", "/ Llama", "processor time", "weights", "what it does besides"],
        [[r["architecture"], r["batch"], r["context"], r["step_ms"], r["ratio"], r["cpu_ratio"], r["weights"], r["why"]]
         for r in results],
    )  # fmt: skip
    facts = llamas[0].facts
    report.finish({
        "bench": "step", "model": "architectures", "dtype": facts.dtype, "device": facts.device, "steps": asked.steps,
        "repeats": asked.repeats, "shape": architectures.SHAPE, "results": results,
        "environment": report.environment(), "neighbour_cores": neighbours.cores,
    })  # fmt: skip
    return 0


def _architecture(asked: argparse.Namespace, name: str) -> tuple[StepMeter, architectures.StepWeights]:
    longest = max(asked.context) + asked.steps + 1
    with tempfile.TemporaryDirectory() as temporary:
        architectures.write_config(Path(temporary), name, positions=longest)
        options = RunnerOptions(
            model_dir=temporary, dtype=asked.dtype, device=asked.device, load_format="dummy",
            max_rows=max(asked.batch), max_step_tokens=max(asked.batch), max_total_tokens=longest,
            device_memory_fraction=GPU_SHARE, kv_cache_bytes=1 << 30,
        )  # fmt: skip
        return StepMeter(load_runner(options), asked.steps), architectures.StepWeights.of(Path(temporary))


def _options(asked: argparse.Namespace, model_dir: Path, config: ModelConfig) -> RunnerOptions:
    """Room for the largest case and no more: a machine's other users keep the rest."""
    longest = max([*asked.prefill, *(context + asked.steps + 1 for context in asked.context)])
    dtype_bytes = 4 if asked.dtype == "float32" else 2
    blocks = 2 + max(
        -(-longest // BLOCK_SIZE),
        *(batch * -(-(context + asked.steps + 1) // BLOCK_SIZE) for batch in asked.batch for context in asked.context),
    )
    return RunnerOptions(
        model_dir=str(model_dir), dtype=asked.dtype, device=asked.device,
        load_format="auto" if asked.model_dir else "dummy", max_rows=max(asked.batch),
        max_step_tokens=max([*asked.prefill, 1]), max_total_tokens=longest, device_memory_fraction=GPU_SHARE,
        kv_cache_bytes=blocks * BLOCK_SIZE * Traffic.of(config).kv_values * dtype_bytes,
    )  # fmt: skip


def _record(
    asked: argparse.Namespace, runner: ModelRunner, config: ModelConfig, decodes: Sequence[Decode],
    prefills: Sequence[Prefill], copy: Spread,
) -> dict[str, Any]:  # fmt: skip
    facts, traffic = runner.facts, Traffic.of(config)
    size = 4 if facts.dtype == "float32" else 2
    results: list[dict[str, Any]] = []
    for case in decodes:
        step = Spread.of(case.step_s)
        weights = traffic.weights * size
        everything = weights + case.batch * case.context * traffic.kv_values * size
        results.append({
            "batch": case.batch, "context": case.context, "step_ms": Spread.of([s * 1e3 for s in case.step_s]),
            "tokens_per_s": case.batch / step.median, "weights_gb_per_s": weights / step.median / 1e9,
            "all_gb_per_s": everything / step.median / 1e9,
            "share_of_copy": everything / step.median / copy.median,
            "bound_tokens_per_s": case.batch * copy.median / everything,
        })  # fmt: skip
    chunks = [
        {
            "tokens": case.tokens, "step_ms": Spread.of([s * 1e3 for s in case.step_s]),
            "tokens_per_s": case.tokens / statistics.median(case.step_s),
            "tflops": _products(config, case.tokens) / statistics.median(case.step_s) / 1e12,
        }
        for case in prefills
    ]  # fmt: skip
    return {
        "bench": "step", "model": str(asked.model_dir or asked.shape), "dtype": facts.dtype, "device": facts.device,
        "weight_bytes_per_step": traffic.weights * size, "weight_bytes_kept": facts.weight_bytes,
        "copy_gb_per_s": copy.median / 1e9, "steps": asked.steps, "repeats": asked.repeats,
        "decode": results, "prefill": chunks, "environment": report.environment(),
    }  # fmt: skip


def _products(config: ModelConfig, tokens: int) -> int:
    """Floating-point operations of a chunk's matrix products; the head serves one token only."""
    head = config.vocab_size * config.hidden_size
    return 2 * (tokens * (Traffic.of(config).weights - head) + head)


def _print(record: dict[str, Any]) -> None:
    print(f"{record['model']}, {record['dtype']} on {record['device']}; "
          f"a copy moves {record['copy_gb_per_s']:.1f} GB/s, a step reads "
          f"{record['weight_bytes_per_step'] / 1e6:.1f} MB of weights")  # fmt: skip
    report.table(
        ["decode batch", "context", "step ms", "tok/s", "weights GB/s", "with KV GB/s", "of copy", "bound tok/s"],
        [
            [
                r["batch"], r["context"], r["step_ms"], r["tokens_per_s"], r["weights_gb_per_s"], r["all_gb_per_s"],
                r["share_of_copy"], r["bound_tokens_per_s"],
            ]
            for r in record["decode"]
        ],
    )  # fmt: skip
    report.table(
        ["prefill tokens", "step ms", "tok/s", "TFLOP/s"],
        [[r["tokens"], r["step_ms"], r["tokens_per_s"], r["tflops"]] for r in record["prefill"]],
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count = report.at_least_one
    parser = report.parser("bench_step", DESCRIPTION, EPILOG)
    parser.add_argument("--shape", choices=SHAPES, default="125m", help="random weights of this shape (%(default)s)")
    parser.add_argument("--model-dir", type=Path, help="a checkpoint's directory, instead of --shape")
    parser.add_argument(
        "--architectures", choices=("all", *architectures.NAMES), nargs="+", metavar="NAME",
        help="compare these, or all, with Llama at one shape, instead of --shape",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what computes (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="computing type (%(default)s)"
    )
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 16, 64], help="sequences decoded (%(default)s)")
    parser.add_argument("--context", type=count, nargs="+", default=[256], help="tokens behind each (%(default)s)")
    parser.add_argument(
        "--prefill",
        type=count,
        nargs="*",
        default=[128, 512],
        help="chunk lengths; nothing after it: none (%(default)s)",
    )
    parser.add_argument("--steps", type=count, default=16, help="decoding steps in one turn (%(default)s)")
    parser.add_argument("--repeats", type=count, default=5, help="turns; at least 3 for a claim (%(default)s)")
    parser.add_argument("--threads", type=count, help="torch's threads (as many as there are processors)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    report.run(main)
