"""`weir plan MODEL`: predicts memory and speed from config.json and the headers of the weights, and says what fits.

Starts nothing, reads no weight and pays for nothing.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch

from serving.errors import ConfigurationError, ModelError
from serving.planning.fit import Demand, Fit, fit
from serving.planning.instances import INSTANCES, PRICES_OF, Gpu, Instance
from serving.runner.footprint import DEFAULT_STEP_TOKENS, Footprint, predict
from serving.runner.memory import anonymous_bytes
from serving.settings import calm_hub, hub_token, process_environment
from serving.weights.checkpoint import Checkpoint, SafetensorsCheckpoint
from serving.weights.model_config import ModelConfig

FITS, FITS_NOT, BAD_USAGE = 0, 1, 2
# The driver's own state, kernels and the buffers of collectives on a GPU: an assumption, not measured.
GPU_OVERHEAD_BYTES = 1 << 30
DTYPES = ("bfloat16", "float16", "float32")
EXAMPLES = """
Examples:

\b
  weir plan ./llama                                  which instances hold it, cheapest first
  weir plan org/model --context 8192 --concurrency 32
  weir plan ./llama --instance ml.g5.12xlarge        exit code 0 if it fits, 1 if not
  weir plan ./llama --budget 5                       only what costs at most 5 dollars an hour
  weir plan ./llama --device cpu --memory 16         a machine without a GPU that has 16 GiB
"""


@dataclass(frozen=True, slots=True)
class Model:
    """What is planned for."""

    config: ModelConfig
    checkpoint: Checkpoint
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Candidate:
    """One instance type and how the model fits it."""

    instance: Instance
    footprint: Footprint
    fit: Fit


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns its exit code: 0 if something fits, 1 if nothing does, 2 for bad usage."""
    try:
        return int(command.main(list(arguments), prog_name="weir plan", standalone_mode=False))
    except (click.ClickException, ConfigurationError) as error:
        click.echo(f"Error: {error.format_message() if isinstance(error, click.ClickException) else error}", err=True)
        return BAD_USAGE


@click.command(help="Tell what MODEL (a directory or a hub id) needs, where it fits and how fast it can be there.",
               epilog=EXAMPLES)  # fmt: skip
@click.argument("model")
@click.option("--instance", help="One SageMaker instance type, such as ml.g5.xlarge.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="US dollars an hour at most.")
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens of a request. [the model's positions, 8192 at most]"
)
@click.option("--concurrency", type=click.IntRange(min=1), default=1, help="Requests of that length at once. [1]")
@click.option("--adapters", type=click.IntRange(min=0), default=0, help="LoRA adapters loaded at a time. [0]")
@click.option("--adapter-rank", type=click.IntRange(min=1), default=64, help="The largest rank of one. [64]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Computing type. [the checkpoint's own]")
@click.option("--revision", help="Revision on the hub.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="What computes. [cuda]")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help="GiB that a machine without a GPU has.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def command(
    model: str, instance: str | None, budget: float | None, context: int | None, concurrency: int, adapters: int,
    adapter_rank: int, dtype: str | None, revision: str | None, device: str, memory: float | None, as_json: bool,
) -> int:  # fmt: skip
    """See the command's help."""
    planned = load(model, revision, dtype)
    demand = Demand(context or min(planned.config.max_position_embeddings, 8192), concurrency, adapters, adapter_rank)
    if demand.context > planned.config.max_position_embeddings:
        raise click.UsageError(f"the model has {planned.config.max_position_embeddings} positions")
    if device == "cpu":
        if memory is None:
            raise click.UsageError("say how much --memory the machine has, in GiB")
        return _plan_cpu(planned, demand, memory, as_json)
    wanted = _instances(instance, budget)
    # Models are built to be weighed: once for every number of GPUs, not for every instance.
    needed = footprints_on_gpus(planned, demand, (each.gpu_count for each in wanted))
    candidates = sorted(
        (
            on_instance(planned, each, needed[each.gpu_count], demand)
            for each in wanted
            if each.gpu_count in needed and (each.gpu.bfloat16 or planned.dtype != torch.bfloat16)
        ),
        key=lambda candidate: (not candidate.fit.fits, candidate.instance.price),
    )
    _print_instances(planned, demand, needed[1], candidates, as_json)
    return FITS if any(candidate.fit.fits for candidate in candidates) else FITS_NOT


def load(model: str, revision: str | None, dtype: str | None) -> Model:
    """Read what is known of a model without its weights. Raises ConfigurationError."""
    if Path(model).is_dir():
        directory, checkpoint = Path(model), SafetensorsCheckpoint(Path(model))
    else:
        calm_hub()  # before its client is imported
        read_headers = import_module("serving.weights.headers").read_headers
        directory, checkpoint = read_headers(model, revision, hub_token(process_environment()))
    config = ModelConfig.load(directory)
    name = dtype or config.dtype or "float32"
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not served; give --dtype {', '.join(DTYPES)}")
    return Model(config, checkpoint, getattr(torch, name))


def footprint(model: Model, demand: Demand, *, device: str, rank_count: int) -> Footprint:
    """What each of so many devices will hold. Raises ModelError where they cannot share the model."""
    return predict(
        model.config, model.checkpoint, dtype=model.dtype, device_type=device, rank_count=rank_count,
        step_tokens=max(DEFAULT_STEP_TOKENS[device], demand.concurrency), max_rows=demand.concurrency,
        longest=demand.context, max_adapters=demand.adapters, max_adapter_rank=demand.adapter_rank,
    )  # fmt: skip


def footprints_on_gpus(model: Model, demand: Demand, counts: Iterable[int]) -> dict[int, Footprint]:
    """What each of 1, and of each of these numbers of GPUs, will hold; without numbers that cannot share the model.

    Raises ModelError where one cannot have it.
    """
    found = {}
    for count in sorted({1, *counts}):
        try:
            found[count] = footprint(model, demand, device="cuda", rank_count=count)
        except ModelError:
            if count == 1:
                raise
    return found


def on_instance(model: Model, instance: Instance, needed: Footprint, demand: Demand) -> Candidate:
    """How the model fits all GPUs of an instance, each of which holds `needed`."""
    fitted = fit(
        needed, demand, memory_bytes=instance.gpu.memory_mib * 2**20 - GPU_OVERHEAD_BYTES,
        bandwidth_gb=instance.gpu.bandwidth_gb, max_position=model.config.max_position_embeddings,
    )  # fmt: skip
    return Candidate(instance, needed, fitted)


def _instances(name: str | None, budget: float | None) -> list[Instance]:
    wanted = [each for each in INSTANCES if name in (None, each.name)]
    if not wanted:
        raise click.UsageError(f"{name} is not in the table: {', '.join(each.name for each in INSTANCES)}")
    return [each for each in wanted if budget is None or each.price <= budget]


def _print_instances(
    model: Model, demand: Demand, whole: Footprint, candidates: Sequence[Candidate], as_json: bool
) -> None:
    if as_json:
        click.echo(json.dumps({
            "dtype": str(model.dtype).removeprefix("torch."), "demand": dataclasses.asdict(demand),
            "footprint": dataclasses.asdict(whole), "prices_of": PRICES_OF,
            "instances": [_as_json(candidate) for candidate in candidates],
        }))  # fmt: skip
        return
    _print_model(model, demand, whole)
    click.echo(f"\nPrices: {PRICES_OF}. Speeds: upper bounds from memory bandwidth. "
               f"{GPU_OVERHEAD_BYTES / 2**30:.0f} GiB a GPU is kept for the driver (assumed).\n")  # fmt: skip
    head = ("instance", "GPUs", "$/hour", "fits", "cache, tokens", f"context at {demand.concurrency}",
            f"requests of {demand.context}", "tokens/s <=")  # fmt: skip
    rows = [head, *(_row(candidate) for candidate in candidates)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        click.echo("  ".join(cell.rjust(width) if i else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(row, widths, strict=True))))  # fmt: skip
    if not candidates:
        click.echo("none of the table's: the budget, the type or the number of heads rules them out")


def _print_model(model: Model, demand: Demand, needed: Footprint) -> None:
    config = model.config
    click.echo(
        f"{config.model_type}, {str(model.dtype).removeprefix('torch.')}: weights {needed.weight_bytes / 1e9:.3f} GB, "
        f"{needed.kv_bytes_per_token} bytes of cache a token, a step about {needed.step_bytes / 1e9:.2f} GB; "
        f"{config.max_position_embeddings} positions\n"
        f"asked for: {demand.concurrency} x {demand.context} tokens = "
        f"{demand.concurrency * demand.context * needed.kv_bytes_per_token / 1e9:.2f} GB of cache"
        + (f", {demand.adapters} adapters = {needed.adapter_bytes / 1e9:.2f} GB" if demand.adapters else "")
    )


def _row(candidate: Candidate) -> tuple[str, ...]:
    gpu: Gpu = candidate.instance.gpu
    fitted = candidate.fit
    return (
        candidate.instance.name, f"{candidate.instance.gpu_count} x {gpu.name}", f"{candidate.instance.price:.2f}",
        "yes" if fitted.fits else "no", str(fitted.kv_tokens), str(fitted.most_context), str(fitted.most_concurrency),
        f"{fitted.tokens_per_s:.0f}" if fitted.fits else "-",
    )  # fmt: skip


def _as_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "instance": candidate.instance.name, "price": candidate.instance.price,
        "gpu_count": candidate.instance.gpu_count, "footprint": dataclasses.asdict(candidate.footprint),
        **dataclasses.asdict(candidate.fit),
    }  # fmt: skip


def _plan_cpu(model: Model, demand: Demand, memory_gib: float, as_json: bool) -> int:
    # This process has imported what the runner imports; what it holds before it plans is what that starts with.
    imported = anonymous_bytes()
    needed = footprint(model, demand, device="cpu", rank_count=1)
    kv_bytes = demand.concurrency * demand.context * needed.kv_bytes_per_token
    peak = imported + needed.weight_bytes + needed.step_bytes + needed.adapter_bytes + kv_bytes
    fits = peak <= memory_gib * 2**30
    if as_json:
        click.echo(json.dumps({
            "dtype": str(model.dtype).removeprefix("torch."), "demand": dataclasses.asdict(demand), "fits": fits,
            "footprint": dataclasses.asdict(needed), "peak_bytes": peak,
        }))  # fmt: skip
    else:
        _print_model(model, demand, needed)
        click.echo(f"peak of the runner process about {peak / 1e9:.2f} GB: {'fits' if fits else 'does not fit'}")
    return FITS if fits else FITS_NOT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
