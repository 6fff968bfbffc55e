"""The scheduler: what each step computes, for whom, and who waits.

Knows no text, no token choice and no device; it plans over counts of tokens and blocks.
"""

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from serving.engine.block_manager import BlockManager
from serving.engine.sequence import Sequence
from serving.plan import NewRow, Row, StepPlan


@dataclass(slots=True)
class Step:
    """One step in the making, and what became of it.

    Attributes:
        budget: tokens that may still be computed.
        rows: tokens to compute, by sequence, in the order of the plan's rows.
        plan: the same for the device; without rows when there is nothing to compute, and not to be submitted then.
        started: sequences that left the queue for the first time.
        hopeless: sequences that all the blocks together cannot hold; they are out.
        preempted: sequences that were put back into the queue.
        prompt_tokens: tokens computed in rows of sequences that had more than one pending, or read by an encoder.
        queried_tokens: tokens of `started` for which the prefix cache was asked.
        cached_tokens: those of them that it spared.
        joined: sequences that were let in beside running ones.
        join_s: seconds that this took.
    """

    budget: int
    rows: dict[Sequence, int] = field(default_factory=dict)
    plan: StepPlan = field(default_factory=lambda: StepPlan(rows=[]))
    started: list[Sequence] = field(default_factory=list)
    hopeless: list[Sequence] = field(default_factory=list)
    preempted: int = 0
    prompt_tokens: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    joined: int = 0
    join_s: float = 0.0


class Scheduler:
    """Lets what is computed catch up with what is known, under one budget of tokens a step.

    Running sequences stand in the order of their admission, and every one of them before every waiting one; when
    blocks run out, the last is put back to the head of the queue and computed again later.

    Attributes:
        waiting: the queue, first in first out.
        running: sequences that hold blocks.
    """

    def __init__(self, blocks: BlockManager, *, max_step_tokens: int, max_rows: int) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_step_tokens = max_step_tokens
        self._max_rows = max_rows
        self._finished: list[int] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; its blocks are free at once, the next plan tells the device."""
        if sequence.running:
            self.running.remove(sequence)
            self.blocks.retire(sequence, time.monotonic())
            sequence.running = False
        else:
            self.waiting.remove(sequence)
        if sequence.on_device:
            self._finished.append(sequence.id)

    def schedule(self) -> Step:
        """Plan the next step. Its rows share the sequences' block lists: commit it before planning another."""
        step = Step(budget=self._max_step_tokens)
        suspect = self._find_suspect()
        if suspect is None:
            self._continue(step)
            self._join(step)
        elif suspect.running:
            self._grow(step, suspect)
        elif not self._start(step, suspect, headroom=0):
            self._continue(step)
        self._write_plan(step)
        return step

    def take_finished(self) -> list[int]:
        """The ids of what the device was told of and shall forget, for a plan that is not made here."""
        finished, self._finished = self._finished, []
        return finished

    def commit(self, step: Step, waiting: Collection[int] = (), failed: Collection[int] = ()) -> None:
        """Count the step's rows as computed; the blocks that are full now can be found by others.

        Args:
            waiting: ids of the sequences whose last token has to be computed again, for the device could not choose.
            failed: ids of those that the device gave up; of them nothing counts.
        """
        for sequence, tokens in step.rows.items():
            if sequence.id not in failed:
                sequence.computed += tokens - (sequence.id in waiting)
                self.blocks.remember(sequence)

    def _find_suspect(self) -> Sequence | None:
        """The sequence that may be what kills the device: it is computed alone until it has its next token."""
        if self.running and self.running[-1].suspect:
            return self.running[-1]
        if self.waiting and self.waiting[0].suspect:
            return self.waiting[0]
        return None

    def _continue(self, step: Step) -> None:
        """Give running sequences their next tokens.

        Only the youngest can still be in its prompt, since nobody is let in behind a prompt that took the rest of
        the budget; so those who decode come first, and no long prompt stalls them.
        """
        for sequence in self.running:  # preemption shortens the list at its end only
            self._grow(step, sequence)

    def _grow(self, step: Step, sequence: Sequence) -> None:
        """Plan a running sequence's next tokens, at the cost of the youngest when blocks run out."""
        tokens = min(sequence.pending, step.budget)
        if tokens == 0:
            return
        while not self.blocks.reserve(sequence, sequence.computed + tokens):
            youngest = self.running[-1]
            if youngest is sequence and len(self.running) == 1:
                self.remove(sequence)
                step.hopeless.append(sequence)
                return
            self._preempt_youngest(step)
            if youngest is sequence:
                return
        step.rows[sequence] = tokens
        # A text is read whole, with the row's first tokens: where it is longer than what is left, the step is.
        step.budget = max(0, step.budget - tokens - sequence.unread)

    def _preempt_youngest(self, step: Step) -> None:
        """Put the youngest back; the step has no row of it yet, as rows are made in the order of admission."""
        sequence = self.running.pop()
        self.blocks.release(sequence)
        sequence.running = False
        self.waiting.appendleft(sequence)
        step.preempted += 1

    def _join(self, step: Step) -> None:
        """Let waiting sequences in, and count those that join running ones."""
        running, begun = len(self.running), time.monotonic()
        self._admit(step)
        if 0 < running < len(self.running):
            step.joined = len(self.running) - running
            step.join_s = time.monotonic() - begun

    def _admit(self, step: Step) -> None:
        """Let waiting sequences in, first come first served, while there is room for all their known tokens.

        Room is what the running sequences do not need: the rest of their prompts, and a block each to grow into.
        """
        if not self.waiting:
            return
        headroom = sum(self._unmet(sequence) for sequence in self.running)
        while self.waiting and step.budget > 0 and len(self.running) < self._max_rows:
            head = self.waiting[0]
            if head.suspect or not self._start(step, head, headroom=headroom):
                return
            if head.running:
                headroom += self._unmet(head)

    def _unmet(self, sequence: Sequence) -> int:
        return self.blocks.needed(len(sequence.token_ids)) - len(sequence.blocks) + 1

    def _start(self, step: Step, sequence: Sequence, *, headroom: int) -> bool:
        """Move the head of the queue into the step; False when there is no room yet."""
        if self.blocks.needed(len(sequence.token_ids)) > self.blocks.total:
            self.remove(sequence)
            step.hopeless.append(sequence)
            return True
        if sequence.refused is not None and not self._is_roomier_than(*sequence.refused):
            return False
        found = self.blocks.lookup(sequence)
        if self.blocks.free_needed(len(sequence.token_ids), found) + headroom > self.blocks.free:
            sequence.refused = (self.blocks.free, len(self.running))
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        self.blocks.start(sequence, found)
        sequence.running = True
        sequence.refused = None
        if sequence.begun is None:
            step.started.append(sequence)
            step.queried_tokens += self.blocks.queried(sequence)
            step.cached_tokens += sequence.computed
        self._grow(step, sequence)
        return True

    def _is_roomier_than(self, free: int, running: int) -> bool:
        return self.blocks.free > free or len(self.running) < running

    def _write_plan(self, step: Step) -> None:
        if not step.rows:
            return
        rows = []
        news = []
        for sequence, tokens in step.rows.items():
            if not sequence.on_device:
                step.prompt_tokens += sequence.unread
                sequence.on_device = True
                news.append(_new_row(sequence))
            start = sequence.computed
            pending = sequence.pending
            if pending > 1:
                step.prompt_tokens += tokens
            rows.append(
                Row(
                    sequence_id=sequence.id,
                    token_ids=sequence.token_ids[start : start + tokens],
                    position=start,
                    block_table=sequence.blocks,
                    sample=tokens == pending,
                )
            )
        step.plan = StepPlan(rows=rows, started=news, finished=self.take_finished())


def _new_row(sequence: Sequence) -> NewRow:
    return NewRow(
        sequence_id=sequence.id,
        token_ids=list(sequence.token_ids),
        prompt_length=sequence.prompt_length,
        sampling=sequence.request.sampling,
        encoder_token_ids=sequence.request.encoder_token_ids,
        adapter=sequence.request.adapter,
    )
