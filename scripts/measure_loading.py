"""Measure how much memory a runner takes while it loads, beside what it keeps.

It must not know how weights are read: it starts the runner's processes and watches them from outside.
"""

import argparse
import dataclasses
import fcntl
import json
import math
import select
import shutil
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from scripts.bench import report
from scripts.bench.models import Shape
from scripts.bench.neighbours import Neighbours
from serving.errors import ModelError
from serving.plan import ModelFacts
from serving.runner.frames import Ready, Refused, RunnerOptions, Start, receive
from serving.runner.remote import Rank

DESCRIPTION = """\
Load a random Llama and watch the runner's processes from outside: anonymous memory (RssAnon), read a thousand times a
second, above what it was when a process had imported everything and waited for its first frame. File pages do not
count: the kernel drops them when it needs to.

kept     bytes of the weights that the process says it keeps
peak     the most there was until the model was warm, with a KV cache of next to nothing
end      what there was then
allowed  1.1 times what is kept and the largest tensor of the checkpoint, whole

A case whose peak is above what is allowed makes the exit code 1. The checkpoint is written to --directory, which must
have room for it, and is deleted afterwards.
"""
EPILOG = """\
examples:
  python -m scripts.measure_loading                          2 GB in bfloat16: alone, on 2 ranks, tied, from float32
  python -m scripts.measure_loading --size 500 --ranks 1     500 MB, one process
  python -m scripts.measure_loading --cases plain float16    only these
"""
ALLOWED_SHARE = 1.1
SAMPLING_S = 0.001
SHARD_BYTES = 500_000_000
LIMIT_S = 900
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Case:
    """How the checkpoint lies on the disk and who loads it; what computes is always bfloat16."""

    stored: str = "bfloat16"
    tied: bool = False
    ranks: int = 1


@dataclass(slots=True)
class Watched:
    """One process, in bytes of anonymous memory above `baseline`.

    Attributes:
        samples: how often it was looked at.
        load_s: seconds from the first frame to its answer.
    """

    rank: Rank
    baseline: int = 0
    peak: int = 0
    end: int = 0
    samples: int = 0
    load_s: float = 0.0
    facts: ModelFacts | None = field(default=None)

    def look(self) -> None:
        """Take a sample."""
        self.end = anonymous_bytes(self.rank.process.pid) - self.baseline
        self.peak = max(self.peak, self.end)
        self.samples += 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code."""
    asked = _arguments(argv)
    cases = {name: case for name, case in _cases(asked.ranks).items() if name in asked.cases}
    results = []
    with Neighbours() as neighbours:
        for name, case in cases.items():
            with checkpoint(asked.directory, case, asked.size * 10**6, asked.vocab) as (directory, largest):
                results += [_result(name, case, i, one, largest) for i, one in enumerate(load(directory, case.ranks))]
    record = {
        "measure": "loading", "size_mb": asked.size, "results": results, "environment": report.environment(),
        "neighbour_cores": neighbours.cores,
    }  # fmt: skip
    columns = ["kept_mb", "largest_tensor_mb", "peak_mb", "end_mb", "allowed_mb", "peak_over_kept", "load_s", "samples"]
    report.table(
        ["case", "rank", "stored", *(name.replace("_", " ") for name in columns), "within"],
        [[r["case"], r["rank"], r["stored"], *(r[name] for name in columns), _yes(r["within"])] for r in results],
    )
    report.finish(record)
    return 0 if all(result["within"] for result in results) else 1


@contextmanager
def checkpoint(parent: Path | None, case: Case, size: int, vocab: int) -> Iterator[tuple[Path, int]]:
    """A random checkpoint of about `size` bytes in several files; its directory, and bytes of its largest tensor.

    The largest counts in the type that it is kept in.
    """
    directory = Path(tempfile.mkdtemp(prefix="weir-loading-", dir=parent))
    try:
        dtype = DTYPES[case.stored]
        shape = _shape(size // dtype.itemsize, vocab, case.tied)
        config = {**shape.config(), "dtype": case.stored}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        _write(directory, _tensor_shapes(shape), dtype)
        yield directory, max(math.prod(s) for s in _tensor_shapes(shape).values()) * torch.bfloat16.itemsize
    finally:
        shutil.rmtree(directory)


def load(directory: Path, ranks: int) -> list[Watched]:
    """Load in as many processes, watched until all are warm. Raises ModelError where they refuse."""
    options = RunnerOptions(
        model_dir=str(directory), dtype="bfloat16", device="cpu", max_rows=1, max_step_tokens=16, max_total_tokens=32,
        kv_cache_bytes=1 << 22, rank_count=ranks, log_level="warn",
    )  # fmt: skip
    watched = [Watched(Rank.start()) for _ in range(ranks)]
    try:
        with tempfile.TemporaryDirectory() as meeting:
            for number, one in enumerate(watched):
                one.baseline = _send_when_imported(one.rank, Start(options, number, str(Path(meeting, "ranks"))))
            _watch(watched)
    finally:
        for one in watched:
            one.rank.channel.close()  # at its end the process leaves
        for one in watched:
            one.rank.process.wait()
    return watched


def anonymous_bytes(pid: int) -> int:
    """What a process has in memory that no file holds."""
    with Path(f"/proc/{pid}/status").open(encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _send_when_imported(rank: Rank, start: Start) -> int:
    """Send the first frame. Returns what the process had in memory before it knew what to load.

    It reads a frame's length when it has imported everything, and then waits for the rest.
    """
    body = msgspec.msgpack.encode(start)
    rank.channel.sendall(len(body).to_bytes(4, "little"))
    deadline = time.monotonic() + LIMIT_S
    while int.from_bytes(fcntl.ioctl(rank.channel, termios.TIOCOUTQ, bytes(4)), "little"):
        if rank.process.poll() is not None or time.monotonic() > deadline:
            raise ModelError(f"a runner process did not start ({rank.how_it_ended()})")
        time.sleep(SAMPLING_S)
    before = anonymous_bytes(rank.process.pid)
    rank.channel.sendall(body)
    return before


def _watch(watched: Sequence[Watched]) -> None:
    begun = time.monotonic()
    deadline = begun + LIMIT_S
    while waiting := [one for one in watched if one.facts is None]:
        if time.monotonic() > deadline:
            raise ModelError(f"the model was not loaded within {LIMIT_S} s")
        for one in watched:
            one.look()
        readable, _, _ = select.select([one.rank.channel for one in waiting], [], [], SAMPLING_S)
        for one in waiting:
            if one.rank.channel in readable:
                answer = msgspec.msgpack.decode(receive(one.rank.channel), type=Ready | Refused)
                if isinstance(answer, Refused):
                    raise ModelError(answer.text)
                one.facts, one.load_s = answer.facts, time.monotonic() - begun
    for one in watched:
        one.look()


def _shape(parameters: int, vocab: int, tied: bool) -> Shape:
    """A Llama of about so many parameters, as wide as leaves it at least four layers."""
    for hidden in (2048, 1024, 512, 256):
        heads = hidden // 64
        shape = Shape(
            hidden=hidden, layers=4, heads=heads, kv_heads=heads // 4, intermediate=hidden * 11 // 4, vocab=vocab,
            tied=tied,
        )  # fmt: skip
        sizes = {name: math.prod(tensor) for name, tensor in _tensor_shapes(shape).items()}
        a_layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
        layers = (parameters - sum(sizes.values())) // a_layer + 4
        if layers >= 4:
            break
    return dataclasses.replace(shape, layers=max(1, layers))


def _tensor_shapes(shape: Shape) -> Mapping[str, tuple[int, ...]]:
    head_dim = shape.hidden // shape.heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": (shape.hidden,),
            f"{at}.self_attn.q_proj.weight": (shape.heads * head_dim, shape.hidden),
            f"{at}.self_attn.k_proj.weight": (shape.kv_heads * head_dim, shape.hidden),
            f"{at}.self_attn.v_proj.weight": (shape.kv_heads * head_dim, shape.hidden),
            f"{at}.self_attn.o_proj.weight": (shape.hidden, shape.heads * head_dim),
            f"{at}.post_attention_layernorm.weight": (shape.hidden,),
            f"{at}.mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            f"{at}.mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            f"{at}.mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        }
    tensors["model.norm.weight"] = (shape.hidden,)
    return tensors if shape.tied else {**tensors, "lm_head.weight": (shape.vocab, shape.hidden)}


def _write(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    tensors: dict[str, torch.Tensor] = {}
    held = files = 0
    with tqdm(desc="Writing", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for i, (name, shape) in enumerate(shapes.items(), 1):
            tensors[name] = torch.empty(shape, dtype=dtype).normal_(std=0.02)
            held += tensors[name].nbytes
            if held >= SHARD_BYTES or i == len(shapes):
                files += 1
                save_file(tensors, directory / f"weights-{files:03d}.safetensors")
                bar.update(held)
                tensors, held = {}, 0


def _cases(ranks: int) -> dict[str, Case]:
    return {
        "plain": Case(), "tied": Case(tied=True), "float16": Case(stored="float16"), "float32": Case(stored="float32"),
        "ranks": Case(ranks=ranks),
    }  # fmt: skip


def _result(name: str, case: Case, rank: int, one: Watched, largest: int) -> dict[str, Any]:
    # What the process says is the sum over the ranks, which have equal parts.
    kept = one.facts.weight_bytes // case.ranks if one.facts is not None else 0
    allowed = ALLOWED_SHARE * kept + largest
    return {
        "case": name, "rank": f"{rank} of {case.ranks}", "stored": case.stored, "kept_mb": kept / 1e6,
        "largest_tensor_mb": largest / 1e6, "peak_mb": one.peak / 1e6, "end_mb": one.end / 1e6,
        "allowed_mb": allowed / 1e6, "peak_over_kept": one.peak / kept, "load_s": one.load_s, "samples": one.samples,
        "within": one.peak <= allowed,
    }  # fmt: skip


def _yes(within: bool) -> str:
    return "yes" if within else "NO"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count, names = report.at_least_one, list(_cases(2))
    parser = report.parser("measure_loading", DESCRIPTION, EPILOG)
    parser.add_argument("--size", type=count, default=2000, help="megabytes of weights on the disk (%(default)s)")
    parser.add_argument("--vocab", type=count, default=32000, help="tokens (%(default)s)")
    parser.add_argument("--ranks", type=count, default=2, help="processes of the case `ranks` (%(default)s)")
    parser.add_argument("--cases", choices=names, nargs="+", default=names, help="what to measure (all)")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is written (the system's temporary files)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    report.run(main)
