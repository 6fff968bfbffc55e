"""Measure what LoRA adapters cost a decoding step, beside the same model without any.

It must not know the engine: plans are written by hand, adapters are random matrices for every projection.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from scripts.bench import report
from scripts.bench.models import SHAPES, write_config
from scripts.bench.neighbours import Neighbours
from scripts.bench.report import Spread
from scripts.bench.steps import Decode, StepMeter
from serving.plan import NewAdapter, StepPlan
from serving.runner.dummy import file_shapes
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner
from serving.runner.memory import cpu_count, keep_freed_memory
from serving.weights.adapter_file import PREFIX

DESCRIPTION = """\
Measure decoding steps of one model of a known shape with random weights, as it is and with LoRA adapters.

Two copies of the model are loaded: one that cannot be adapted, and one with room for adapters that hold matrices of
--rank for every projection of every layer. B sequences take the N adapters in turn (0: none of them has one). Every
turn of a case stands beside a turn of the model that cannot be adapted: `/ plain` is the median of the ratios of such
pairs, of which either comes first by turns.
"""
EPILOG = """\
examples:
  python -m scripts.bench_adapters                                the 125M shape: batches 1 and 16
  python -m scripts.bench_adapters --rank 64 --adapters 0 1       one large adapter
  python -m scripts.bench_adapters --shape 8b --device cuda --batch 64 --adapters 0 1 8 64
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code."""
    asked = _arguments(argv)
    keep_freed_memory()
    torch.set_num_threads(asked.threads or cpu_count())
    with tempfile.TemporaryDirectory() as temporary:
        plain, adapted = _meters(asked, Path(temporary))
    cases = [
        (Decode(batch, asked.context), Decode(batch, asked.context, adapters))
        for batch in asked.batch
        for adapters in asked.adapters
        if adapters <= batch
    ]
    with Neighbours() as neighbours:
        for turn in tqdm(range(asked.repeats), desc="Measuring", unit="turn", disable=None):
            for without, having in cases:
                pair = [(plain, without), (adapted, having)]
                for meter, case in pair if turn % 2 else reversed(pair):
                    meter.decode(case)
    results = [
        {
            "batch": having.batch, "adapters": having.adapters,
            "step_ms": Spread.of([s * 1e3 for s in having.step_s]),
            "ratio": Spread.of([a / b for a, b in zip(having.step_s, without.step_s, strict=True)]),
        }
        for without, having in cases
    ]  # fmt: skip
    report.table(
        ["batch", "adapters", "step ms", "/ plain"],
        [[r["batch"], r["adapters"], r["step_ms"], r["ratio"]] for r in results],
    )
    report.finish({
        "bench": "adapters", "model": asked.shape, "dtype": plain.facts.dtype, "device": plain.facts.device,
        "rank": asked.rank, "context": asked.context, "steps": asked.steps, "repeats": asked.repeats,
        "results": results, "environment": report.environment(), "neighbour_cores": neighbours.cores,
    })  # fmt: skip
    return 0


def _meters(asked: argparse.Namespace, directory: Path) -> tuple[StepMeter, StepMeter]:
    write_config(directory, SHAPES[asked.shape])
    most, longest = max(asked.adapters), asked.context + asked.steps + 1

    def meter(max_adapters: int, adapters: Sequence[NewAdapter]) -> StepMeter:
        options = RunnerOptions(
            model_dir=str(directory), dtype=asked.dtype, device=asked.device, load_format="dummy",
            max_rows=max(asked.batch), max_step_tokens=max(asked.batch), max_total_tokens=longest,
            device_memory_fraction=0.45, kv_cache_bytes=1 << 30, max_adapters=max_adapters,
            max_adapter_rank=asked.rank,
        )  # fmt: skip
        runner = load_runner(options)
        refused = runner.execute(StepPlan(rows=[], adapters=list(adapters))).refused
        if refused:
            sys.exit(f"Error: {next(iter(refused.values()))}")
        return StepMeter(runner, asked.steps)

    shapes = {name: shape for name, shape in file_shapes(directory).items() if name.endswith("_proj.weight")}
    drawn = [NewAdapter(i, str(_adapter(directory / f"adapter{i}", shapes, asked.rank))) for i in range(1, most + 1)]
    return meter(0, []), meter(max(most, 1), drawn)


def _adapter(directory: Path, shapes: dict[str, torch.Size], rank: int) -> Path:
    directory.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "random", "r": rank, "lora_alpha": rank}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs).bfloat16() * 0.02
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank).bfloat16() * 0.02
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count = report.at_least_one
    parser = report.parser("bench_adapters", DESCRIPTION, EPILOG)
    parser.add_argument("--shape", choices=SHAPES, default="125m", help="random weights of this shape (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what computes (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="computing type (%(default)s)"
    )
    parser.add_argument("--rank", type=count, default=16, help="of the adapters' matrices (%(default)s)")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4, 16], help="in a batch (%(default)s)")
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 16], help="sequences decoded (%(default)s)")
    parser.add_argument("--context", type=count, default=256, help="tokens behind each (%(default)s)")
    parser.add_argument("--steps", type=count, default=16, help="decoding steps in one turn (%(default)s)")
    parser.add_argument("--repeats", type=count, default=7, help="turns; at least 3 for a claim (%(default)s)")
    parser.add_argument("--threads", type=count, help="torch's threads (as many as there are processors)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    report.run(main)
