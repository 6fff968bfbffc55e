"""Stand-ins for the device, and a tokenizer that needs no files.

`FakeRunner` computes no logits, but it behaves like a paged device: every slot of every block holds a digest of the
text up to there, and the next token follows from what is read back through the block table of the row. A wrong
table, a stale or shared block, a hole or a step out of order changes its answer or trips an assertion.
"""

import hashlib
import struct
import time
from collections import deque
from collections.abc import Callable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from serving.errors import RunnerDied
from serving.plan import Choice, ModelFacts, NewRow, Row, RowResult, StepPlan, StepResult
from serving.tokenizer import Tokenizer

DIGEST_BYTES = 8
ROOT = b"\0" * DIGEST_BYTES


def byte_tokenizer() -> Tokenizer:
    """One token a byte: ids 0 and 1 are the special `</s>` (end of sequence) and `<s>`, then the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: token_id for token_id, token in enumerate(["</s>", "<s>", *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


class DeviceRow:
    """What the device remembers of one sequence; `adapter` is its directory, "" for the model as it is."""

    def __init__(self, new: NewRow, adapter: str) -> None:
        self.prompt = new.token_ids[: new.prompt_length]
        self.number = new.adapter
        self.adapter = adapter
        root = _read_by_encoder(new.encoder_token_ids) if new.encoder_token_ids else ROOT
        self.root = _digest([root, adapter.encode()]) if adapter else root
        self.token_ids = list(new.token_ids)
        self.sampling = new.sampling


class FakeRunner:
    """A deterministic `plan.Runner`.

    Args:
        vocab_size: ids are below it.
        block_count: with block 0, which is never handed out.
        delay_s: how long a step takes.
        die_after: plans that are answered before the device dies; None = never dies.
        dies_on: dies on the plans for which this is true.
        reply: the generated ids by prompt ids; after them `eos_token_id` for ever. None = ids from a hash.
        adapted: what an adapter of a directory makes of such ids.
        max_adapters: how many it has room for.
        refuses: why it does not load the adapter of a directory; None where it does.
        bad_choice: replaces a row's choice; for devices that answer nonsense.

    Attributes:
        rows: what is remembered, by sequence id.
        plans: how many plans were answered.
        adapters: directories of the loaded ones, by number.
        computed_tokens: over all plans.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        *,
        block_size: int = 4,
        block_count: int = 1024,
        max_step_tokens: int = 512,
        max_rows: int = 64,
        max_position: int = 4096,
        delay_s: float = 0.0,
        die_after: int | None = None,
        dies_on: Callable[[StepPlan], bool] | None = None,
        reply: Callable[[list[int]], list[int]] | None = None,
        eos_token_id: int = 0,
        bad_choice: Callable[[Row, Choice], Choice | None] | None = None,
        adapted: Callable[[list[int], str], list[int]] | None = None,
        max_adapters: int = 8,
        refuses: Callable[[str], str | None] = lambda directory: None,
    ) -> None:
        self._facts = ModelFacts(
            vocab_size=vocab_size,
            max_position=max_position,
            block_size=block_size,
            block_count=block_count,
            max_step_tokens=max_step_tokens,
            max_rows=max_rows,
            dtype="float32",
            device="fake",
            weight_bytes=0,
            kv_bytes=block_size * block_count * DIGEST_BYTES,
        )
        self._slots: list[list[bytes]] = [[b""] * block_size for _ in range(block_count)]
        self._results: deque[StepResult] = deque()
        self._delay_s = delay_s
        self._die_after = die_after
        self._dies_on = dies_on
        self._reply = reply
        self._eos_token_id = eos_token_id
        self._bad_choice = bad_choice
        self._adapted = adapted
        self._max_adapters = max_adapters
        self._refuses = refuses
        self._dead = False
        self.adapters: dict[int, str] = {}
        self.rows: dict[int, DeviceRow] = {}
        self.plans = 0
        self.computed_tokens = 0
        self.closed = False

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def alive(self) -> bool:
        return not self._dead and not self.closed

    def kill(self) -> None:
        """Die now, as a process does that was sent SIGKILL."""
        self._dead = True

    def close(self) -> None:
        self.closed = True

    def submit(self, plan: StepPlan) -> None:
        if self._die_after is not None and self.plans >= self._die_after:
            self._dead = True
        if self._dies_on is not None and self._dies_on(plan):
            self._dead = True
        if not self.alive():
            raise RunnerDied("the fake device died")
        self._results.append(self._compute(plan))
        self.plans += 1

    def collect(self) -> StepResult:
        if not self.alive():
            raise RunnerDied("the fake device died")
        if self._delay_s:
            time.sleep(self._delay_s)
        return self._results.popleft()

    def _compute(self, plan: StepPlan) -> StepResult:
        for sequence_id in plan.finished:
            assert sequence_id in self.rows, "finished names a row that the device does not know"
            del self.rows[sequence_id]
        for number in plan.dropped:
            assert all(row.number != number for row in self.rows.values()), "a row uses a dropped adapter"
            del self.adapters[number]
        refused = {adapter.number: why for adapter in plan.adapters if (why := self._refuses(adapter.directory))}
        for adapter in plan.adapters:
            assert adapter.number >= 1
            assert adapter.number not in self.adapters, "an adapter was loaded twice"
            if adapter.number not in refused:
                self.adapters[adapter.number] = adapter.directory
        assert len(self.adapters) <= self._max_adapters, "more adapters than the device has room for"
        if plan.adapters and not plan.rows:
            return StepResult(rows=[], refused=refused)
        for new in plan.started:
            assert new.adapter == 0 or new.adapter in self.adapters, "a row with an adapter that is not there"
            assert new.sequence_id not in self.rows, "a row was started twice"
            assert 0 < new.prompt_length <= len(new.token_ids)
            self.rows[new.sequence_id] = DeviceRow(new, self.adapters.get(new.adapter, ""))
        assert len(self.rows) <= self._facts.max_rows, "more sequences than the device has room for"
        assert plan.rows, "an empty plan"
        assert len({row.sequence_id for row in plan.rows}) == len(plan.rows), "two rows of one sequence"
        assert len(plan.rows) <= self._facts.max_rows
        assert sum(len(row.token_ids) for row in plan.rows) <= self._facts.max_step_tokens
        for row in plan.rows:
            self._check(row)
        contexts = [self._read(row, row.position) for row in plan.rows]
        for row, context in zip(plan.rows, contexts, strict=True):
            self._write(row, context[-1] if context else self.rows[row.sequence_id].root)
        for row, context in zip(plan.rows, contexts, strict=True):
            assert self._read(row, row.position) == context, "a row wrote where another one reads"
        return StepResult(rows=[self._answer(row) for row in plan.rows], refused=refused)

    def _check(self, row: Row) -> None:
        known = self.rows[row.sequence_id].token_ids
        end = row.position + len(row.token_ids)
        size = self._facts.block_size
        assert row.token_ids, "nothing to compute"
        assert known[row.position : end] == row.token_ids, "other tokens than the device knows"
        assert row.sample == (end == len(known)), "sample does not say whether the row ends what is known"
        assert len(row.block_table) == -(-end // size), "the table does not fit the positions"
        assert all(0 < block < self._facts.block_count for block in row.block_table), "no such block, or block 0"
        assert len(set(row.block_table)) == len(row.block_table), "a block twice in one table"

    def _read(self, row: Row, count: int) -> list[bytes]:
        slots: list[bytes] = []
        for block in row.block_table[: -(-count // self._facts.block_size)]:
            slots += self._slots[block]
        del slots[count:]
        assert b"" not in slots, "an unwritten slot was read"
        return slots

    def _write(self, row: Row, digest: bytes) -> None:
        size = self._facts.block_size
        for position, token_id in enumerate(row.token_ids, row.position):
            digest = hashlib.blake2b(digest + struct.pack("<I", token_id), digest_size=DIGEST_BYTES).digest()
            self._slots[row.block_table[position // size]][position % size] = digest
        self.computed_tokens += len(row.token_ids)

    def _answer(self, row: Row) -> RowResult:
        state = self.rows[row.sequence_id]
        end = row.position + len(row.token_ids)
        slots = self._read(row, end)
        logprobs = []
        if state.sampling.prompt_logprobs:
            logprobs = [_logprob(slots[: at + 1]) for at in range(row.position, min(end, len(state.prompt) - 1))]
        if not row.sample:
            return RowResult(sequence_id=row.sequence_id, prompt_logprobs=logprobs)
        choice: Choice | None = self._choose(state, slots)
        if self._bad_choice is not None:
            choice = self._bad_choice(row, choice)
        if choice is not None:
            state.token_ids.append(choice.token_id)
        return RowResult(sequence_id=row.sequence_id, choice=choice, prompt_logprobs=logprobs)

    def _choose(self, state: DeviceRow, slots: list[bytes]) -> Choice:
        vocab_size = self._facts.vocab_size
        if self._reply is None:
            token_id = int.from_bytes(_digest(slots), "little") % vocab_size
        else:
            reply = self._reply(state.prompt)
            if state.adapter and self._adapted is not None:
                reply = self._adapted(reply, state.adapter)
            at = len(state.token_ids) - len(state.prompt)
            token_id = reply[at] if at < len(reply) else self._eos_token_id
        logprob = _logprob(slots)
        top = [((token_id + i) % vocab_size, logprob - i) for i in range(state.sampling.top_n_tokens)]
        return Choice(token_id=token_id, logprob=logprob, top=top)


def _read_by_encoder(ids: list[int]) -> bytes:
    return hashlib.blake2b(struct.pack(f"<{len(ids)}I", *ids), digest_size=DIGEST_BYTES).digest()


def _digest(slots: list[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(slots), digest_size=DIGEST_BYTES).digest()


def _logprob(slots: list[bytes]) -> float:
    return -(_digest(slots)[0] + 1) / 64
