"""One device with a model: executes step plans.

Knows no engine, no text and no other device.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from serving.errors import GenerationError
from serving.layers.lora import AdapterSlots, Span
from serving.models.select import CausalModel
from serving.plan import Choice, ModelFacts, NewAdapter, NewRow, Row, RowResult, StepPlan, StepResult
from serving.runner.encoder import EncoderStates
from serving.runner.inputs import InputBuilder, Inputs
from serving.sampling.sampler import Sampler, raw_logprobs

# Positions whose logits are made at once when prompt log probabilities are asked for: a whole chunk's would not fit.
_LOGPROB_SLICE = 64


class ModelRunner:
    """`plan.Runner` in this process; owns the model and its sampling state. Not for two threads.

    Args:
        sampler: `None` on ranks that compute, but choose no tokens: their results are empty.
        encoder: what an encoder-decoder's rows have read; `None` for a decoder alone.
        adapters: those that the model's layers were built with; `None` where they cannot be adapted.
    """

    def __init__(
        self, model: CausalModel, inputs: InputBuilder, sampler: Sampler | None, facts: ModelFacts,
        encoder: EncoderStates | None = None, adapters: AdapterSlots | None = None,
    ) -> None:  # fmt: skip
        self._model, self._inputs, self._sampler, self._facts = model, inputs, sampler, facts
        self._encoder, self._adapters = encoder, adapters
        self._adapter_of: dict[int, int] = {}
        self._wants_prompt_logprobs: dict[int, NewRow] = {}
        self._results: deque[StepResult] = deque()

    @property
    def facts(self) -> ModelFacts:
        """See `plan.Runner`."""
        return self._facts

    def submit(self, plan: StepPlan) -> None:
        """See `plan.Runner`; in this process the plan is executed at once."""
        self._results.append(self.execute(plan))

    def collect(self) -> StepResult:
        """See `plan.Runner`."""
        return self._results.popleft()

    def alive(self) -> bool:
        """See `plan.Runner`."""
        return True

    def close(self) -> None:
        """See `plan.Runner`; the tensors go with the object."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a plan's rows and choose their next tokens."""
        self._finish(plan.finished)
        refused = self._change_adapters(plan.dropped, plan.adapters)
        self._start(plan.started)
        if not plan.rows:
            return StepResult(rows=[], refused=refused)
        inputs = self._build_inputs(plan.rows)
        hidden = self._model(inputs.batch)
        broken = self._erase_broken(plan.rows, inputs, hidden)
        sampled = [i for i, row in enumerate(plan.rows) if row.sample and i not in broken]
        outcomes = {**broken, **dict(zip(sampled, self._choose(plan.rows, inputs, hidden, sampled), strict=True))}
        return StepResult(
            rows=[
                _row_result(row, outcomes.get(i), self._prompt_logprobs(row, hidden, inputs.starts[i]))
                for i, row in enumerate(plan.rows)
            ],
            refused=refused,
        )

    def _erase_broken(self, rows: Sequence[Row], inputs: Inputs, hidden: Tensor) -> dict[int, GenerationError]:
        """The rows for which the model computed no numbers, and the error of each.

        Nothing stays of what they wrote: masks add, and what is added to NaN in a block that another row has next
        stays NaN.
        """
        sound = hidden.isfinite().all(-1)
        if bool(sound.all()):
            return {}
        broken = {}
        for i, row in enumerate(rows):
            tokens = slice(inputs.starts[i], inputs.starts[i] + len(row.token_ids))
            if not bool(sound[tokens].all()):
                self._inputs.erase(inputs, tokens)
                broken[i] = GenerationError("the model computed something that is not a finite number")
        return broken

    def _finish(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in sequence_ids:
            if self._sampler is not None:
                self._sampler.finish(sequence_id)
            self._wants_prompt_logprobs.pop(sequence_id, None)
            self._adapter_of.pop(sequence_id, None)
            if self._encoder is not None:
                self._encoder.finish(sequence_id)

    def _start(self, rows: Sequence[NewRow]) -> None:
        for row in rows:
            if self._sampler is not None:
                self._sampler.start(row)
            if row.sampling.prompt_logprobs:
                self._wants_prompt_logprobs[row.sequence_id] = row
            if row.adapter:
                self._adapter_of[row.sequence_id] = row.adapter
        if self._encoder is not None:
            self._encoder.start(rows)

    def _change_adapters(self, dropped: Sequence[int], added: Sequence[NewAdapter]) -> dict[int, str]:
        """Why adapters were refused, by their numbers."""
        if self._adapters is None:
            return {adapter.number: "this server was started without room for adapters" for adapter in added}
        for number in dropped:
            self._adapters.drop(number)
        answers = ((adapter.number, self._adapters.load(adapter.number, Path(adapter.directory))) for adapter in added)
        return {number: refusal for number, refusal in answers if refusal is not None}

    def _build_inputs(self, rows: Sequence[Row]) -> Inputs:
        if self._encoder is not None:
            return self._encoder.build(self._inputs, rows)
        if self._adapters is None:
            return self._inputs.build(rows)
        numbers = [self._adapter_of.get(row.sequence_id, 0) for row in rows]
        inputs = self._inputs.build(rows, numbers)
        self._adapters.use(Span(numbers[i], inputs.starts[i], len(rows[i].token_ids)) for i in inputs.order)
        return inputs

    def _choose(
        self, rows: Sequence[Row], inputs: Inputs, hidden: Tensor, sampled: list[int]
    ) -> list[Choice | GenerationError | None]:
        if not sampled:
            return []
        last = [inputs.starts[i] + len(rows[i].token_ids) - 1 for i in sampled]
        logits = self._model.logits(hidden[torch.tensor(last, device=hidden.device)])
        if self._sampler is None:
            return [None] * len(sampled)
        return self._sampler.choose(logits, [rows[i] for i in sampled])

    def _prompt_logprobs(self, row: Row, hidden: Tensor, start: int) -> list[float]:
        started = self._wants_prompt_logprobs.get(row.sequence_id)
        if started is None:
            return []
        targets = started.token_ids[
            row.position + 1 : min(row.position + len(row.token_ids) + 1, started.prompt_length)
        ]
        found: list[float] = []
        for i in range(0, len(targets), _LOGPROB_SLICE):
            ids = targets[i : i + _LOGPROB_SLICE]
            logits = self._model.logits(hidden[start + i : start + i + len(ids)])
            if self._sampler is not None:
                found += raw_logprobs(logits, torch.tensor(ids, device=logits.device))
        return found


def _row_result(row: Row, outcome: Choice | GenerationError | None, prompt_logprobs: list[float]) -> RowResult:
    if isinstance(outcome, GenerationError):
        return RowResult(sequence_id=row.sequence_id, error=outcome.detail)
    return RowResult(
        sequence_id=row.sequence_id,
        choice=outcome,
        prompt_logprobs=prompt_logprobs,
        waiting=row.sample and outcome is None,
    )
