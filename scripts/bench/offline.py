"""The engine without HTTP: one runner process, one engine, jobs in and tokens out.

Knows no peer and no server.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from scripts.bench.workloads import Job
from serving.engine.engine import Engine
from serving.protocol import Request, SamplingParams, StopParams
from serving.runner.frames import RunnerOptions
from serving.runner.remote import RunnerProcess
from serving.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a set of jobs.

    Attributes:
        tokens: the generated ids, job by job.
        elapsed_s: from handing the jobs over to the last token.
        forward_s: the part of it in which the device computed.
        steps: how many steps it took.
        cached_tokens: prompt tokens that the prefix cache spared.
    """

    tokens: list[list[int]]
    elapsed_s: float
    forward_s: float
    steps: int
    cached_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Over all jobs together."""
        return sum(map(len, self.tokens)) / self.elapsed_s


class OfflineEngine:
    """An engine over a runner process of its own; a context that ends the process.

    Raises:
        ModelError: the model cannot be served.
        RunnerDied: its process ended while loading.
    """

    def __init__(self, model_dir: Path, options: RunnerOptions) -> None:
        self._runner = RunnerProcess.start(options)
        facts = self.facts = self._runner.facts
        self._engine = Engine(
            self._runner, Tokenizer.load(model_dir), eos_token_ids=frozenset(),
            max_step_tokens=facts.max_step_tokens, max_rows=facts.max_rows,
        )  # fmt: skip
        self._ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Hand all jobs over at once and decode greedily until the last is whole. Raises RuntimeError if one fails."""
        tokens: dict[int, list[int]] = {}
        begun = time.perf_counter()
        for job, request_id in zip(jobs, self._ids, strict=False):
            tokens[request_id] = []
            self._engine.add(request_id, _request(job))
        forward_s, steps, cached = 0.0, 0, 0
        while self._engine.has_work():
            outputs, stats = self._engine.step()
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(f"the engine gave a request up: {output.error}")
                tokens[output.request_id] += (token.id for token in output.tokens)
            forward_s, steps, cached = forward_s + stats.forward_s, steps + 1, cached + stats.cached_tokens
        return Outcome(list(tokens.values()), time.perf_counter() - begun, forward_s, steps, cached)

    def peak_rss_bytes(self) -> int:
        """The most memory that the runner process held since it measured its worst step; loading is not in it."""
        return sum(peak_rss_bytes(pid) for pid in self._runner.pids)


def peak_rss_bytes(pid: int) -> int:
    """The high-water mark of a process's resident memory; what it holds now where the kernel keeps no mark."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return int(psutil.Process(pid).memory_info().rss)
    marks = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    return next(marks, 0)


def _request(job: Job) -> Request:
    return Request(
        prompt_token_ids=job.prompt,
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=job.wanted, ignore_eos=True),
    )
