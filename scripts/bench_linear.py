"""Measure the kernels behind the linear layer: which is fastest for how many rows.

It must not know a model: weights are random and of the shapes asked for.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from scripts.bench import report
from scripts.bench.neighbours import Neighbours
from scripts.bench.report import Spread
from serving.layers.linear import Linear, PackedLinear
from serving.runner.memory import cpu_count, keep_freed_memory

DESCRIPTION = """\
Compare the kernels that a linear layer can choose between on a CPU, by weight shape, type and number of rows.

linear   torch's own F.linear
packed   a weight that oneDNN laid out in its blocked format once, at load
unpack   the packed weight turned back into a plain one for every product, then F.linear: what it would cost to keep
         only the packed weight and still use F.linear for many rows (measured from --unpack-from rows up)

A model's step reads every weight once, so no weight is in the processor's caches when its turn comes. Here, too, the
products go round among as many copies of a weight as make up --working-set megabytes. The kernels take turns, and a
ratio is the median of the ratios of turns that stood side by side.
"""
EPILOG = """\
examples:
  python -m scripts.bench_linear                             the layers of the 125M model, float32 and bfloat16
  python -m scripts.bench_linear --shapes 2048x2048 11264x2048 2048x5632 32000x2048 --dtypes bfloat16
  python -m scripts.bench_linear --shapes 4096x768 --rows 1 2 3 4 6 8
"""
# qkv, attention's output, gate and up, down, head
SHAPES_125M = ["1280x768", "768x768", "4096x768", "768x2048", "32000x768"]
SHORTEST_TURN_S = 0.01
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class Case:
    """One shape, type and number of rows.

    Attributes:
        times_s: by kernel, seconds of one product in each turn.
        difference: the largest difference between `packed` and `linear`, relative to the largest result.
    """

    out_features: int
    in_features: int
    dtype: str
    rows: int
    difference: float = 0.0
    times_s: dict[str, list[float]] = field(default_factory=dict)


class Kernels:
    """A weight's copies behind each kernel.

    Args:
        working_set: bytes that the copies make up together, at least.
    """

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, working_set: int) -> None:
        nbytes = out_features * in_features * dtype.itemsize
        count = max(1, -(-working_set // nbytes))
        weights = [torch.randn(out_features, in_features).mul_(0.02).to(dtype) for _ in range(count)]
        self._plain = [Linear(weight, None) for weight in weights]
        self._packed = [PackedLinear(weight, None) for weight in weights]

    def products(self, unpack: bool) -> Mapping[str, Sequence[Callable[[Tensor], Tensor]]]:
        """By kernel, the product with each copy."""
        kernels: dict[str, Sequence[Callable[[Tensor], Tensor]]] = {"linear": self._plain, "packed": self._packed}
        if unpack:
            kernels["unpack"] = [_unpacking(layer) for layer in self._packed]
        return kernels


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code."""
    asked = _arguments(argv)
    keep_freed_memory()
    torch.set_num_threads(asked.threads or cpu_count())
    torch.manual_seed(0)
    cases: list[Case] = []
    weights = [(shape, dtype) for shape in asked.shapes for dtype in asked.dtypes]
    with Neighbours() as neighbours, tqdm(total=len(weights) * len(asked.rows), unit="case", disable=None) as bar:
        for (out_features, in_features), dtype in weights:
            kernels = Kernels(out_features, in_features, DTYPES[dtype], asked.working_set << 20)
            for rows in asked.rows:
                case = Case(out_features, in_features, dtype, rows)
                _measure(case, kernels.products(rows >= asked.unpack_from), asked.repeats)
                cases.append(case)
                bar.update()
    record = {
        "bench": "linear", "repeats": asked.repeats, "working_set_mb": asked.working_set,
        "results": [_result(case) for case in cases], "environment": report.environment(),
        "neighbour_cores": neighbours.cores,
    }  # fmt: skip
    _print(record["results"])
    report.finish(record)
    return 0


def _unpacking(layer: PackedLinear) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        return F.linear(x, layer.packed.to_dense(), layer.bias)

    return product


def _measure(case: Case, kernels: Mapping[str, Sequence[Callable[[Tensor], Tensor]]], repeats: int) -> None:
    x = torch.randn(case.rows, case.in_features).to(DTYPES[case.dtype])
    outputs = {name: products[0](x) for name, products in kernels.items()}
    largest = outputs["linear"].float().abs().max().item()
    case.difference = (outputs["packed"].float() - outputs["linear"].float()).abs().max().item() / largest
    for _ in range(repeats):
        for name, products in kernels.items():
            case.times_s.setdefault(name, []).append(_turn(x, products))


def _turn(x: Tensor, products: Sequence[Callable[[Tensor], Tensor]]) -> float:
    """Seconds of one product; whole rounds through the copies."""
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < SHORTEST_TURN_S or count == 0:
        for product in products:
            product(x)
        count += len(products)
    return elapsed / count


def _result(case: Case) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in case.times_s.items()}
    speedups = {name: _speedup(case, name) for name in medians}
    nbytes = case.out_features * case.in_features * DTYPES[case.dtype].itemsize
    return {
        "shape": f"{case.out_features}x{case.in_features}", "dtype": case.dtype, "rows": case.rows,
        "ms": {name: median * 1e3 for name, median in medians.items()},
        "weights_gb_per_s": {name: nbytes / median / 1e9 for name, median in medians.items()},
        "gflops": 2 * case.rows * case.out_features * case.in_features / min(medians.values()) / 1e9,
        "speedup": {name: speedup for name, speedup in speedups.items() if name != "linear"},
        # By the ratios within turns, as everything that is claimed: on a busy machine medians of times can contradict.
        "fastest": max(speedups, key=lambda name: speedups[name].median), "difference": case.difference,
    }  # fmt: skip


def _speedup(case: Case, name: str) -> Spread:
    pairs = zip(case.times_s["linear"], case.times_s[name], strict=True)
    return Spread.of([linear / other for linear, other in pairs])


def _print(results: Sequence[dict[str, Any]]) -> None:
    report.table(
        ["out x in", "dtype", "rows", "linear ms", "packed ms", "linear GB/s", "packed GB/s", "packed / linear",
         "unpack / linear", "fastest", "difference"],
        [
            [
                r["shape"], r["dtype"], r["rows"], r["ms"]["linear"], r["ms"]["packed"],
                r["weights_gb_per_s"]["linear"], r["weights_gb_per_s"]["packed"], r["speedup"]["packed"],
                r["speedup"].get("unpack"), r["fastest"], f"{r['difference']:.1e}",
            ]
            for r in results
        ],
    )  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    return report.at_least_one(out_features), report.at_least_one(in_features)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    count = report.at_least_one
    parser = report.parser("bench_linear", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=[_shape(text) for text in SHAPES_125M], metavar="OUTxIN",
        help=f"weight shapes ({' '.join(SHAPES_125M)})",
    )  # fmt: skip
    parser.add_argument("--rows", type=count, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="inputs (%(default)s)")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES), help="types (%(default)s)")
    parser.add_argument("--unpack-from", type=count, default=256, help="least rows for `unpack` (%(default)s)")
    parser.add_argument("--working-set", type=count, default=128, help="megabytes of weights (%(default)s)")
    parser.add_argument("--repeats", type=count, default=5, help="turns; at least 3 for a claim (%(default)s)")
    parser.add_argument("--threads", type=count, help="torch's threads (as many as there are processors)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    report.run(main)
