"""Steps of a runner and their time: plans written by hand for a case, and the clock around them.

Knows no engine and no shape.
"""

import random
import statistics
import time
from dataclasses import dataclass, field

from serving.plan import NewRow, Row, StepPlan, StepResult
from serving.protocol import SamplingParams
from serving.runner.model_runner import ModelRunner
from serving.runner.sizing import BLOCK_SIZE

SHORTEST_TURN_S = 0.05


@dataclass(slots=True)
class Decode:
    """One case: `batch` sequences, `context` tokens behind each.

    Attributes:
        adapters: how many the sequences have in turn, numbered from 1; 0 for the model as it is.
        step_s: a turn's mean time of a step.
        cpu_s: the processor time of one in this process, of all threads together.
    """

    batch: int
    context: int
    adapters: int = 0
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Prefill:
    """One case: the first `tokens` of one sequence."""

    tokens: int
    step_s: list[float] = field(default_factory=list)


class StepMeter:
    """Writes plans for a runner and times them.

    Args:
        steps: decoding steps in one turn.

    Attributes:
        facts: the runner's.
    """

    def __init__(self, runner: ModelRunner, steps: int) -> None:
        self._runner, self._steps = runner, steps
        self.facts = runner.facts
        self._source = random.Random(0)
        self._next_id = 0

    def fits(self, batch: int, tokens: int) -> bool:
        """Whether the KV cache holds `batch` sequences of `tokens`."""
        return batch * -(-tokens // BLOCK_SIZE) < self.facts.block_count

    def decode(self, case: Decode) -> None:
        """One turn. The keys and values behind the sequences are whatever lies in the cache: only time counts."""
        length = case.context + self._steps + 1
        width = -(-length // BLOCK_SIZE)
        ids = self._new_ids(case.batch)
        tables = [list(range(1 + i * width, 1 + (i + 1) * width)) for i in range(case.batch)]
        newest = self._random_ids(case.batch)
        started = [self._started(i, case, 1 + n % case.adapters if case.adapters else 0) for n, i in enumerate(ids)]
        times, busy = [], []
        for step in range(self._steps + 1):
            position = case.context + step - 1
            rows = [
                Row(sequence_id=i, token_ids=[token], position=position, sample=True, block_table=_cut(table, position))
                for i, token, table in zip(ids, newest, tables, strict=True)
            ]
            begun, begun_busy = time.perf_counter(), time.process_time()
            result = self._execute(StepPlan(rows=rows, started=started))
            times.append(time.perf_counter() - begun)
            busy.append(time.process_time() - begun_busy)
            newest, started = [row.choice.token_id for row in result.rows if row.choice is not None], []
        self._execute(StepPlan(rows=[], finished=ids))
        # The first took the sequences in and may have met cold caches.
        case.step_s.append(statistics.fmean(times[1:]))
        case.cpu_s.append(statistics.fmean(busy[1:]))

    def prefill(self, case: Prefill) -> None:
        """One turn: chunks until they took a while together."""
        times: list[float] = []
        while sum(times) < SHORTEST_TURN_S:
            (sequence_id,) = self._new_ids(1)
            tokens = self._random_ids(case.tokens)
            new = NewRow(
                sequence_id=sequence_id, token_ids=tokens, prompt_length=len(tokens), sampling=SamplingParams()
            )
            table = list(range(1, 1 - (-case.tokens // BLOCK_SIZE)))
            row = Row(sequence_id=sequence_id, token_ids=tokens, position=0, block_table=table, sample=True)
            begun = time.perf_counter()
            self._execute(StepPlan(rows=[row], started=[new]))
            times.append(time.perf_counter() - begun)
            self._execute(StepPlan(rows=[], finished=[sequence_id]))
        case.step_s.append(statistics.fmean(times))

    def _execute(self, plan: StepPlan) -> StepResult:
        """The choices come back as Python numbers: on a GPU, too, the step is over when this returns."""
        self._runner.submit(plan)
        return self._runner.collect()

    def _started(self, sequence_id: int, case: Decode, adapter: int) -> NewRow:
        return NewRow(
            sequence_id=sequence_id, token_ids=self._random_ids(case.context), prompt_length=case.context,
            sampling=SamplingParams(), adapter=adapter,
        )  # fmt: skip

    def _new_ids(self, count: int) -> list[int]:
        self._next_id += count
        return list(range(self._next_id - count, self._next_id))

    def _random_ids(self, count: int) -> list[int]:
        return [self._source.randrange(self.facts.vocab_size) for _ in range(count)]


def _cut(table: list[int], position: int) -> list[int]:
    return table[: position // BLOCK_SIZE + 1]
