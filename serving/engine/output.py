"""A step's results, request by request: tokens, text that can be shown, and how a generation ends.

Knows no block, no queue and no other request than the one in hand.
"""

from serving.engine.sequence import Sequence
from serving.errors import GenerationError
from serving.plan import Choice, Row, RowResult
from serving.protocol import Finish, FinishReason, FirstToken, OutputToken, RequestOutput, TokenLogprob
from serving.tokenizer import Tokenizer


class OutputProcessor:
    """Appends a step's chosen tokens to their sequences and says what clients learn of it.

    Args:
        vocab_size: ids that the model can choose are below it.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def process(self, sequence: Sequence, row: Row, result: RowResult, now: float) -> RequestOutput | None:
        """Take one row's result in; None while the prompt is not computed, or the device not ready to choose.

        Args:
            now: `time.monotonic()` when the device answered.

        Raises:
            GenerationError: the device gave this sequence up, or answered nonsense; the sequence is as it was.
        """
        if result.error is not None:
            raise GenerationError(result.error)
        if row.sample != (result.choice is not None or result.waiting):
            raise GenerationError("the device chose no token, or one too many")
        if result.prompt_logprobs:
            # A preempted prompt is computed twice; what is known of it already is not taken again.
            sequence.prompt_logprobs += result.prompt_logprobs[len(sequence.prompt_logprobs) - row.position :]
        return None if result.choice is None else self._add_token(sequence, result.choice, now)

    def cut(self, sequence: Sequence, now: float) -> RequestOutput:
        """End a sequence with what is there of it, without another token.

        Args:
            now: `time.monotonic()`.
        """
        return RequestOutput(
            request_id=sequence.id,
            text=_rest_of_text(sequence),
            first=None if sequence.generated else _first(sequence, now),
            finish=_finish(sequence, FinishReason.LENGTH, now, cut=True),
        )

    def _add_token(self, sequence: Sequence, choice: Choice, now: float) -> RequestOutput:
        self._check(choice)
        token_id = choice.token_id
        sequence.token_ids.append(token_id)
        sequence.deaths = 0
        token_text, shown = self._add_text(sequence, token_id)
        reason = _finish_reason(sequence, token_id)
        finish = None
        if reason is not None or sequence.overdue(now):
            shown += _rest_of_text(sequence)
            finish = _finish(sequence, reason or FinishReason.LENGTH, now, cut=reason is None)
        return RequestOutput(
            request_id=sequence.id,
            tokens=[
                OutputToken(
                    id=token_id,
                    text=token_text,
                    logprob=choice.logprob,
                    special=self._tokenizer.is_special(token_id),
                    top=[self._describe(top_id, logprob) for top_id, logprob in choice.top],
                )
            ],
            text=shown,
            prompt=self._prompt(sequence) if sequence.generated == 1 else [],
            first=_first(sequence, now) if sequence.generated == 1 else None,
            finish=finish,
        )

    def _add_text(self, sequence: Sequence, token_id: int) -> tuple[str, str]:
        """The token's own text, and what can be shown now; an end token has no part in the text."""
        ends = token_id in sequence.end_ids
        if self._tokenizer.is_special(token_id):
            text = self._tokenizer.token_text(token_id)
            shown = token_id in sequence.request.stop.shown_token_ids
            return text, "" if ends else sequence.text.add(text, hidden=not shown)
        if ends:
            return self._tokenizer.token_text(token_id), ""
        text = sequence.detokenizer.push(token_id)
        return text, sequence.text.add(text)

    def _check(self, choice: Choice) -> None:
        ids = (choice.token_id, *(top_id for top_id, _ in choice.top))
        if not all(0 <= token_id < self._vocab_size for token_id in ids):
            raise GenerationError("the device chose a token outside the vocabulary")

    def _describe(self, token_id: int, logprob: float | None) -> TokenLogprob:
        return TokenLogprob(
            id=token_id,
            text=self._tokenizer.token_text(token_id),
            logprob=logprob,
            special=self._tokenizer.is_special(token_id),
        )

    def _prompt(self, sequence: Sequence) -> list[TokenLogprob]:
        if not sequence.request.sampling.prompt_logprobs:
            return []
        logprobs = [None, *sequence.prompt_logprobs]
        return [
            self._describe(token_id, logprob)
            for token_id, logprob in zip(sequence.request.prompt_token_ids, logprobs, strict=True)
        ]


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    """TGI's order: the length wins over an end token, and that over a stop string."""
    if sequence.generated >= sequence.request.stop.max_new_tokens:
        return FinishReason.LENGTH
    if token_id in sequence.end_ids:
        return FinishReason.EOS_TOKEN
    if sequence.text.stopped:
        return FinishReason.STOP_SEQUENCE
    return None


def _rest_of_text(sequence: Sequence) -> str:
    """What was held back: nothing follows that it might have been a part of."""
    return sequence.text.add(sequence.detokenizer.flush()) + sequence.text.close()


def _first(sequence: Sequence, now: float) -> FirstToken:
    return FirstToken(arrived=sequence.arrived, begun=_begun(sequence, now), reached=now)


def _begun(sequence: Sequence, now: float) -> float:
    return now if sequence.begun is None else sequence.begun


def _finish(sequence: Sequence, reason: FinishReason, now: float, *, cut: bool) -> Finish:
    begun = _begun(sequence, now)
    return Finish(
        reason=reason,
        text=sequence.text.whole(),
        generated_tokens=sequence.generated,
        queue_s=begun - sequence.arrived,
        inference_s=now - begun,
        cut=cut,
    )
