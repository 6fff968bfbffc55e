"""The engine: requests in, one step of the whole batch at a time, outputs out.

Knows no thread, no torch and no clock but `time.monotonic`; whoever calls it does so from one thread.
"""

import logging
import time
from collections.abc import Callable

import msgspec

from serving.engine.adapters import DeviceAdapters
from serving.engine.block_manager import BlockManager
from serving.engine.leases import Key
from serving.engine.output import OutputProcessor
from serving.engine.scheduler import Scheduler, Step
from serving.engine.sequence import Sequence
from serving.errors import AdapterRefused, GenerationError, RunnerDied
from serving.plan import Row, RowResult, Runner, StepPlan, StepResult
from serving.protocol import Request, RequestOutput, StepStats
from serving.tokenizer import Tokenizer

MAX_DEATHS = 3

log = logging.getLogger(__name__)


class Engine:
    """Decodes many requests together, on one runner.

    Args:
        runner: the loaded device; the engine closes it in `close`.
        eos_token_ids: ids at which a generation ends, unless its request ignores them.
        max_step_tokens: tokens computed in one step, over all sequences; never more than the device was measured with.
        max_rows: sequences in one step; never more than the device was measured with.
        prefix_caching: whether computed blocks are remembered and found again.
        lease_share: how much of the KV cache open sessions may keep while nobody else needs it.
        max_adapters: how many LoRA adapters the device has room for.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        max_step_tokens: int,
        max_rows: int,
        prefix_caching: bool = True,
        lease_share: float = 0.5,
        max_adapters: int = 0,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._max_step_tokens = max_step_tokens
        self._max_rows = max_rows
        self._prefix_caching = prefix_caching
        self._lease_share = lease_share
        self._sequences: dict[int, Sequence] = {}
        self._dying: list[Sequence] = []
        self._lost: StepStats | None = None
        self._adapters = DeviceAdapters(max_adapters)
        self._lost_adapters: dict[int, str] = {}
        self._unsaid: list[RequestOutput] = []  # last outputs of requests that are in no step any more
        self._scheduler = self._make_scheduler()
        self._processor = self._make_processor()

    def add(self, request_id: int, request: Request, arrived: float | None = None) -> None:
        """Queue a request.

        Args:
            request_id: never used a second time.
            arrived: `time.monotonic()` of when it was handed over, if that is not now.
        """
        if not self._adapters.accepts(request.adapter):
            self._unsaid.append(RequestOutput(request_id=request_id, error="its adapter was unloaded"))
            return
        sequence = Sequence.start(
            request_id,
            request,
            tokenizer=self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            arrived=time.monotonic() if arrived is None else arrived,
        )
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: int) -> None:
        """Forget a request and free its blocks at once; no output follows. Unknown ids are ignored: they finished."""
        if request_id in self._sequences:
            self._forget(self._sequences[request_id])
        self._unsaid = [output for output in self._unsaid if output.request_id != request_id]

    def end_session(self, key: Key) -> None:
        """Keep nothing more for a session; its running requests go on without one. Unknown ones are ignored."""
        self._scheduler.blocks.end_lease(key)
        for sequence in self._sequences.values():
            if sequence.session is not None and (sequence.request.cache_salt, sequence.session.id) == key:
                sequence.session = None

    def load_adapter(self, number: int, directory: str) -> None:
        """Have the device load a LoRA adapter, between two steps; requests may then have its number.

        Args:
            number: at least 1, never used a second time.

        Raises:
            NoRoomForAdapter: the device has as many as it can hold.
            AdapterRefused: the device cannot compute with it.
            RunnerDied: the device is gone; `restart` loads the adapter into a new one.
        """
        self._adapters.add(number, directory, self._adapters_in_use())
        reason = self._bring_adapters().get(number)
        if reason is not None:
            raise AdapterRefused(reason)

    def drop_adapter(self, number: int) -> None:
        """Give an adapter up: no new request has it, those under way keep it, then the device forgets it."""
        self._adapters.drop(number)

    def has_adapter(self, number: int) -> bool:
        """Whether requests can be computed with it."""
        return self._adapters.has(number)

    def take_lost_adapters(self) -> dict[int, str]:
        """By number, why adapters could not be brought to a new device; each is told once."""
        lost, self._lost_adapters = self._lost_adapters, {}
        return lost

    def has_work(self) -> bool:
        """Whether `step` would have something to do."""
        return bool(self._sequences or self._unsaid)

    def alive(self) -> bool:
        """Whether the runner can still be used; never blocks."""
        return self._runner.alive()

    def close(self) -> None:
        """Let go of the device. Safe to call twice."""
        self._runner.close()

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[list[RequestOutput], StepStats]:
        """Advance the batch by one forward of the device.

        Args:
            meanwhile: called once while the device computes.

        Raises:
            RunnerDied: the device is gone; nothing of this step counts but `lost_step`. Call `restart` with a new
                runner.
        """
        begun = time.monotonic()
        self._scheduler.blocks.expire_leases(begun)
        step = self._scheduler.schedule()
        submitted = time.monotonic()
        try:
            result = self._execute(step, begun, meanwhile)
        except RunnerDied:
            died = time.monotonic()
            self._lost = self._stats(step, forward_s=died - submitted, step_s=died - begun, failed=True)
            raise
        answered = time.monotonic()
        self._scheduler.commit(
            step,
            waiting={row.sequence_id for row in result.rows if row.waiting},
            failed={row.sequence_id for row in result.rows if row.error is not None},
        )
        committed = time.monotonic()
        outputs = self._process(step, result, answered)
        skipped, gaps = self._measure(outputs, answered)
        processed = time.monotonic()
        self._filter(outputs)
        ended = time.monotonic()
        stats = self._stats(
            step,
            forward_s=answered - submitted,
            step_s=ended - begun,
            decode_s=processed - committed,
            filter_s=ended - processed,
            skipped=skipped,
            gaps=gaps,
        )
        return outputs, stats

    def lost_step(self) -> StepStats:
        """The step that the runner last died with, in numbers; its rows are computed again after `restart`."""
        return self.load() if self._lost is None else self._lost

    def restart(self, runner: Runner) -> list[RequestOutput]:
        """Go on with a new runner: every live sequence is computed again from its tokens, its stream goes on.

        A request whose plans died `MAX_DEATHS` times without a token in between is given up; one death short of
        that, it is computed alone, so that a poisonous request takes no innocent one with it. So are the requests of
        an adapter that the new device refuses.

        Returns:
            The last outputs of the requests given up.

        Raises:
            RunnerDied: the new device is gone too, while it loaded an adapter. Call `restart` with another one: what
                kills the device twice is not loaded again.
        """
        self._runner = runner
        for sequence in self._dying:
            sequence.deaths += 1
            if sequence.deaths >= MAX_DEATHS and self._sequences.pop(sequence.id, None) is not None:
                self._unsaid.append(_failure(sequence, "the device process died while computing this request"))
        self._dying = []
        self._scheduler = self._make_scheduler()
        self._processor = self._make_processor()
        for sequence in self._sequences.values():
            sequence.forget_device()
            self._scheduler.add(sequence)
        self._adapters.forget_device()
        self._lost_adapters |= self._bring_adapters()
        for sequence in [each for each in self._sequences.values() if not self._adapters.has(each.request.adapter)]:
            self._forget(sequence)
            self._unsaid.append(_failure(sequence, "its adapter could not be loaded again"))
        return self._take_unsaid()

    def load(self) -> StepStats:
        """The engine between steps: what waits, runs and is used; everything that a step would count is 0."""
        return self._stats(Step(budget=0), forward_s=0.0, step_s=0.0)

    def _execute(self, step: Step, begun: float, meanwhile: Callable[[], None]) -> StepResult:
        for sequence in step.started:
            sequence.begun = begun
        if not step.rows:
            meanwhile()
            return StepResult(rows=[])
        self._dying = list(step.rows)
        dropped = self._adapters.take_unused(self._adapters_in_use())
        self._runner.submit(msgspec.structs.replace(step.plan, dropped=dropped) if dropped else step.plan)
        meanwhile()
        result = self._runner.collect()
        _check_rows(step.plan, result)
        self._dying = []
        return result

    def _bring_adapters(self) -> dict[int, str]:
        """Have the device load what it lacks, one with a plan; returns why it refused some. Raises RunnerDied."""
        refused: dict[int, str] = {}
        dropped = self._adapters.take_unused(self._adapters_in_use())
        for adapter in self._adapters.missing():
            finished = self._scheduler.take_finished()
            plan = StepPlan(rows=[], finished=finished, dropped=dropped, adapters=[adapter])
            dropped = []
            try:
                self._runner.submit(plan)
                result = self._runner.collect()
            except RunnerDied:
                if self._adapters.died(adapter.number):
                    self._lost_adapters[adapter.number] = "the device process died while it was loaded"
                raise
            if adapter.number in result.refused:
                self._adapters.refused(adapter.number)
            else:
                self._adapters.arrived(adapter.number)
            refused |= result.refused
        return refused

    def _adapters_in_use(self) -> set[int]:
        return {sequence.request.adapter for sequence in self._sequences.values()}

    def _take_unsaid(self) -> list[RequestOutput]:
        unsaid, self._unsaid = self._unsaid, []
        return unsaid

    def _process(self, step: Step, result: StepResult, now: float) -> list[RequestOutput]:
        outputs = self._take_unsaid()
        for sequence, row, row_result in zip(step.rows, step.plan.rows, result.rows, strict=True):
            output = self._process_row(sequence, row, row_result, now)
            if output is not None:
                outputs.append(output)
        for sequence in step.hopeless:
            del self._sequences[sequence.id]
            outputs.append(_failure(sequence, "the request needs more KV cache than the device has"))
        return outputs + self._cut(now, {output.request_id for output in outputs})

    def _cut(self, now: float, told: set[int]) -> list[RequestOutput]:
        """The last outputs of the sequences whose deadline has passed and that have no token of this step."""
        overdue = [sequence for sequence in self._sequences.values() if sequence.overdue(now)]
        return [self._processor.cut(sequence, now) for sequence in overdue if sequence.id not in told]

    def _measure(
        self, outputs: list[RequestOutput], now: float
    ) -> tuple[tuple[int, ...], tuple[tuple[float, int], ...]]:
        """`skipped` and `gaps` of the step's statistics."""
        skipped = []
        gaps: dict[float, int] = {}
        for output in outputs:
            if output.tokens:
                sequence = self._sequences[output.request_id]
                skipped.append(len(output.tokens) - 1)
                if sequence.latest is not None:
                    gap = now - sequence.latest
                    gaps[gap] = gaps.get(gap, 0) + 1
                sequence.latest = now
        return tuple(skipped), tuple(gaps.items())

    def _filter(self, outputs: list[RequestOutput]) -> None:
        """Take the sequences out of the batch that have their last output."""
        for output in outputs:
            if (output.finish is not None or output.error is not None) and output.request_id in self._sequences:
                self._forget(self._sequences[output.request_id])

    def _process_row(self, sequence: Sequence, row: Row, result: RowResult, now: float) -> RequestOutput | None:
        """One request's fault must not end the others: whatever is raised here is that request's own error."""
        try:
            return self._processor.process(sequence, row, result, now)
        except GenerationError as error:
            return _failure(sequence, error.detail)
        except Exception:
            log.exception("request %d failed while its output was made", sequence.id)
            return _failure(sequence, "the output could not be made")

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence)

    def _stats(
        self,
        step: Step,
        *,
        forward_s: float,
        step_s: float,
        decode_s: float = 0.0,
        filter_s: float = 0.0,
        skipped: tuple[int, ...] = (),
        gaps: tuple[tuple[float, int], ...] = (),
        failed: bool = False,
    ) -> StepStats:
        blocks = self._scheduler.blocks
        return StepStats(
            rows=len(step.rows),
            prompt_tokens=step.prompt_tokens,
            started=len(step.started),
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            preempted=step.preempted,
            blocks_used=blocks.used,
            blocks_total=blocks.total,
            cached_tokens=step.cached_tokens,
            forward_s=forward_s,
            step_s=step_s,
            joined=step.joined,
            most_tokens=sum(sequence.most_tokens for sequence in self._scheduler.running),
            join_s=step.join_s,
            decode_s=decode_s,
            filter_s=filter_s,
            queried_tokens=step.queried_tokens,
            skipped=skipped,
            gaps=gaps,
            failed=failed,
            blocks_leased=blocks.leased,
        )

    def _make_scheduler(self) -> Scheduler:
        facts = self._runner.facts
        return Scheduler(
            BlockManager(
                facts.block_count,
                facts.block_size,
                prefix_caching=self._prefix_caching,
                lease_share=self._lease_share,
            ),
            max_step_tokens=min(self._max_step_tokens, facts.max_step_tokens),
            max_rows=min(self._max_rows, facts.max_rows),
        )

    def _make_processor(self) -> OutputProcessor:
        return OutputProcessor(self._tokenizer, vocab_size=self._runner.facts.vocab_size)


def _failure(sequence: Sequence, detail: str) -> RequestOutput:
    return RequestOutput(request_id=sequence.id, error=detail)


def _check_rows(plan: StepPlan, result: StepResult) -> None:
    if [row.sequence_id for row in plan.rows] != [row.sequence_id for row in result.rows]:
        raise RunnerDied("the device answered for other rows than those it was given")
