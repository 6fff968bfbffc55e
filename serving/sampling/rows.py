"""What the device remembers of every sequence to choose its tokens: what was asked, and what has been seen.

Knows no logits and no schedule.
"""

from concurrent.futures import Future
from typing import NamedTuple

import torch

from serving.errors import ValidationError
from serving.grammar.compiler import GrammarCompiler, Matcher
from serving.plan import NewRow
from serving.protocol import SamplingParams


class Kinds(NamedTuple):
    """The kinds of work that a row's parameters ask for; rows that agree in them can be computed together."""

    marked: bool
    biased: bool
    penalized: bool
    masked: bool
    tempered: bool
    narrowed: bool
    typical: bool
    drawn: bool


class SamplingRow:
    """One sequence's sampling state.

    Attributes:
        params: what was asked.
        kinds: what has to be done with the row's logits.
        plain: whether nothing has: the choice is the model's own argmax.
        bias: ids [n] int64 and their additions [n] float32, where asked for; ids outside the vocabulary are left out.
        counts: [2, vocab] int32, where a penalty needs them: how often each id stands in prompt and output, and
            how often in the output alone.
        matcher: where the row stands in its grammar, if it has one and `settle_grammar` said yes.
        fault: why the row's grammar cannot be followed any more, if so.
    """

    def __init__(
        self, row: NewRow, vocab_size: int, device: torch.device, compiler: GrammarCompiler | None = None
    ) -> None:
        params = row.sampling
        self.params: SamplingParams = params
        self.bias = _bias(params, vocab_size, device)
        self.counts = _counts(row, vocab_size, device) if _penalizes(params) else None
        self.matcher: Matcher | None = None
        self.fault: str | None = None
        self._compiling: Future[Matcher] | None = None
        self._written = row.token_ids[row.prompt_length :]
        if params.grammar is not None and compiler is not None:
            self._compiling = compiler.begin(params.grammar)
        elif params.grammar is not None:
            self.fault = "grammar is not supported"
        self.kinds = Kinds(
            marked=params.watermark is not None,
            biased=self.bias is not None,
            penalized=self.counts is not None,
            masked=params.grammar is not None,
            tempered=params.temperature != 1.0,
            narrowed=params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0,
            typical=params.typical_p < 1.0,
            drawn=params.do_sample,
        )
        self.plain = not any(self.kinds)

    def remember(self, token_id: int) -> None:
        """Count a chosen token, and follow it in the grammar; look at `fault` afterwards."""
        if self.counts is not None:
            self.counts[:, token_id] += 1
        if self.matcher is not None:
            self.matcher.advance((token_id,))
            self.look_for_fault()

    def look_for_fault(self) -> None:
        """Let `fault` tell what became of the matcher."""
        if self.matcher is not None and (error := self.matcher.error) is not None:
            self.fault = f"the grammar cannot be followed: {error}"

    def settle_grammar(self, wait_s: float) -> bool:
        """Whether it is known if the row's grammar can be followed: `matcher` or `fault` is set then, if it has one.

        A row that was moved here goes to where it stood in its grammar.

        Args:
            wait_s: how long the grammar's compiling may hold the step up.
        """
        if self._compiling is None:
            return True
        try:
            self.matcher = self._compiling.result(wait_s).fork()
        except TimeoutError:
            return False
        except ValidationError as error:  # the words wing tried it: only a grammar at the edge of a limit gets here
            self.fault = error.detail
        else:
            self.matcher.advance(self._written)
            self.look_for_fault()
        self._compiling = None
        return True


class SamplingRows:
    """The sampling state of every sequence that lives on the device; the only owner of it."""

    def __init__(self, vocab_size: int, device: torch.device, compiler: GrammarCompiler | None = None) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._compiler = compiler
        self._rows: dict[int, SamplingRow] = {}

    def start(self, row: NewRow) -> None:
        """Take a sequence in; a second start of the same id replaces the first."""
        self._rows[row.sequence_id] = SamplingRow(row, self._vocab_size, self._device, self._compiler)

    def finish(self, sequence_id: int) -> None:
        """Forget a sequence; an unknown id is ignored."""
        self._rows.pop(sequence_id, None)

    def __getitem__(self, sequence_id: int) -> SamplingRow:
        """The state of a started sequence. Raises KeyError."""
        return self._rows[sequence_id]

    def __len__(self) -> int:
        return len(self._rows)


def _penalizes(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.relative_frequency_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _bias(params: SamplingParams, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    bias = {token_id: value for token_id, value in params.logit_bias.items() if 0 <= token_id < vocab_size}
    if not bias:
        return None
    ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
    return ids, torch.tensor(list(bias.values()), dtype=torch.float32, device=device)


def _counts(row: NewRow, vocab_size: int, device: torch.device) -> torch.Tensor:
    ids = torch.tensor(row.token_ids, dtype=torch.int64)
    seen = torch.bincount(ids, minlength=vocab_size)
    written = torch.bincount(ids[row.prompt_length :], minlength=vocab_size)
    return torch.stack((seen, written)).to(device=device, dtype=torch.int32)  # [2, vocab]
