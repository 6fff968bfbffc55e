"""The sampler: rows of logits to chosen tokens with their log probabilities.

Knows no model and no schedule. What is chosen for a row is the same alone and in any batch.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Final

import torch

from serving.errors import GenerationError
from serving.grammar.compiler import GrammarCompiler
from serving.plan import Choice, NewRow, Row
from serving.protocol import SamplingParams
from serving.sampling import candidates, noise, processors, watermark
from serving.sampling.candidates import Candidates
from serving.sampling.grammar_mask import GrammarMasks
from serving.sampling.rows import Kinds, SamplingRow, SamplingRows

# How many of the largest logits the filters look at before they ask for more: sorting 32,000 costs twenty times this.
_FIRST_LOOK: Final = 256
_SECOND_LOOK: Final = 4096
# Rows on a GPU are processed together. On a CPU one at a time is faster (a row stays in the cache) and makes it plain
# that nothing depends on batch mates.
_GPU_ROWS: Final = 256
# With nothing but a grammar little is done to a row, and the calls cost more than what they do.
_ONLY_MASKED: Final = Kinds(
    marked=False, biased=False, penalized=False, masked=True, tempered=False, narrowed=False, typical=False, drawn=False
)
# Log probabilities of whole prompts go through this many rows at once, which bounds the memory they take.
_LOGPROB_ROWS: Final = 64
_ARGMAX_BLOCK: Final = 256
# Most grammars are compiled in less, and then no row is computed again for want of one.
_PATIENCE_S: Final = 0.01
# Ties can make more than n alternatives; a row of equal logits must not make a hundred thousand.
_TIES: Final = 4


class Sampler:
    """Chooses one token a row.

    The order of the processors is watermark, logit bias, repetition penalty, relative frequency penalty, frequency
    and presence penalties, grammar, temperature, top_k, top_p, min_p, typical_p. A draw is the argmax of the
    processed logits plus noise that depends on nothing but (seed, position, token id); without `do_sample` it is
    the argmax itself, and the lowest id wins a tie. NaN logits count as minus infinity; a row without any finite
    logit chooses id 0.

    Args:
        compiler: of the rows' grammars; without one a row that has a grammar fails.
    """

    def __init__(self, vocab_size: int, device: torch.device, compiler: GrammarCompiler | None = None) -> None:
        self._rows = SamplingRows(vocab_size, device, compiler)
        self._compiler = compiler
        self._masks = None if compiler is None else GrammarMasks(compiler, device)
        self._vocab = torch.arange(vocab_size, device=device)
        self._device = device

    def start(self, row: NewRow) -> None:
        """Remember a sequence's parameters and count its tokens; a second start of the same id replaces the first."""
        self._rows.start(row)

    def finish(self, sequence_id: int) -> None:
        """Forget a sequence; an unknown id is ignored."""
        self._rows.finish(sequence_id)

    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Choice | GenerationError | None]:
        """Choose the next token of every row and count it.

        A row whose grammar cannot be followed has an error, and one whose grammar is still being compiled has nothing.

        Args:
            logits: [rows, vocab] float32, one line for each of `rows`, in order; left as they are.
            rows: only those with `sample`; their sequences were started. Raises KeyError otherwise.
        """
        states = [self._rows[row.sequence_id] for row in rows]
        # First: on a GPU the logits are still being computed.
        waiting = _waiting(states)
        masks = self._mask_bits(states)
        plain = [index for index, state in enumerate(states) if state.plain]
        choices: dict[int, Choice] = {}
        if plain:
            chosen = _choose_plain(logits if len(plain) == len(rows) else logits[plain], [states[i] for i in plain])
            choices.update(zip(plain, chosen, strict=True))
        for group in _groups(states, waiting, at_once=1 if self._device.type == "cpu" else _GPU_ROWS):
            bits = torch.stack([masks[i] for i in group]) if states[group[0]].kinds.masked else None
            chosen = self._choose_group(logits[group], [rows[i] for i in group], [states[i] for i in group], bits)
            choices.update(zip(group, chosen, strict=True))
        return [
            None if index in waiting else self._remember(state, choices.get(index))
            for index, state in enumerate(states)
        ]

    def _mask_bits(self, states: Sequence[SamplingRow]) -> dict[int, torch.Tensor]:
        """The mask ([words] int32) of each row whose grammar can be followed; the others' `fault` says why not."""
        followed = [
            (index, state.matcher)
            for index, state in enumerate(states)
            if state.matcher is not None and state.fault is None
        ]
        if not followed or self._masks is None:
            return {}
        bits = self._masks.bits([matcher for _, matcher in followed])
        for index, _ in followed:
            states[index].look_for_fault()
        return {index: line for (index, _), line in zip(followed, bits, strict=True)}

    def _remember(self, state: SamplingRow, choice: Choice | None) -> Choice | GenerationError:
        if choice is not None:
            state.remember(choice.token_id)
        if choice is not None and state.fault is None:
            return choice
        if self._compiler is not None and state.params.grammar is not None:
            self._compiler.forget(state.params.grammar)
        return GenerationError(state.fault or "no token could be chosen")

    def _choose_group(
        self,
        logits: torch.Tensor,
        rows: Sequence[Row],
        states: Sequence[SamplingRow],
        bits: torch.Tensor | None,
    ) -> list[Choice]:
        """Choose for rows of the same kinds; `logits` [rows, vocab] is a copy that may be changed."""
        params = [state.params for state in states]
        keys = [noise.draw_key(asked.seed, _length(row)) for asked, row in zip(params, rows, strict=True)]
        self._edit(logits, rows, states, bits)
        if not states[0].kinds.narrowed:
            return self._draw(Candidates(logits, self._vocab.expand_as(logits)), params, keys)
        choices: list[Choice | None] = [None] * len(rows)
        left = list(range(len(rows)))
        for look in (_FIRST_LOOK, _SECOND_LOOK, logits.shape[-1]):
            lines = logits if len(left) == len(rows) else logits[left]
            kept, enough = self._narrow(lines, [params[index] for index in left], look)
            settled = [place for place, done in enumerate(enough) if done]
            if settled:
                part = Candidates(kept.values[settled], kept.ids[settled])
                chosen = self._draw(part, [params[left[i]] for i in settled], [keys[left[i]] for i in settled])
                for place, choice in zip(settled, chosen, strict=True):
                    choices[left[place]] = choice
            left = [index for index, done in zip(left, enough, strict=True) if not done]
            if not left:
                break
        return [choice for choice in choices if choice is not None]

    def _edit(
        self,
        logits: torch.Tensor,
        rows: Sequence[Row],
        states: Sequence[SamplingRow],
        bits: torch.Tensor | None,
    ) -> None:
        kinds = states[0].kinds
        if kinds.marked:
            marks = [state.params.watermark for state in states if state.params.watermark is not None]
            watermark.favour(logits, [row.token_ids[-1] for row in rows], marks)
        if kinds.biased:
            for line, state in zip(logits, states, strict=True):
                if state.bias is not None:
                    line.index_add_(0, *state.bias)
        if kinds.penalized:
            self._penalize(logits, states, [_length(row) for row in rows])
        processors.define(logits)
        if bits is not None and self._masks is not None:
            self._masks.apply(logits, bits)
        if kinds.tempered:
            processors.temperature(logits, self._column(state.params.temperature for state in states))

    def _penalize(self, logits: torch.Tensor, states: Sequence[SamplingRow], lengths: Sequence[int]) -> None:
        counts = torch.stack([state.counts for state in states if state.counts is not None])  # [rows, 2, vocab]
        seen, written = counts.unbind(1)
        asked = [state.params for state in states]
        if any(params.repetition_penalty != 1.0 for params in asked):
            penalty = self._column(params.repetition_penalty for params in asked)
            processors.repetition_penalty(logits, seen, penalty)
        if any(params.relative_frequency_penalty != 0.0 for params in asked):
            penalty = self._column(params.relative_frequency_penalty for params in asked)
            processors.relative_frequency_penalty(logits, seen, self._column(lengths), penalty)
        if any(params.frequency_penalty != 0.0 for params in asked):
            processors.frequency_penalty(logits, written, self._column(p.frequency_penalty for p in asked))
        if any(params.presence_penalty != 0.0 for params in asked):
            processors.presence_penalty(logits, written, self._column(p.presence_penalty for p in asked))

    def _narrow(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], look: int
    ) -> tuple[Candidates, list[bool]]:
        vocab = logits.shape[-1]
        found = candidates.largest(logits, look)
        top_k = [min(asked.top_k, vocab) for asked in params]
        kept, enough = candidates.narrow(
            found,
            candidates.weight(logits),
            torch.tensor(top_k, dtype=torch.int64, device=self._device).unsqueeze(-1),
            self._column(asked.top_p for asked in params),
            self._column(asked.min_p for asked in params),
        )
        return kept, [True] * len(params) if look >= vocab else enough.tolist()

    def _draw(self, kept: Candidates, params: Sequence[SamplingParams], keys: Sequence[int]) -> list[Choice]:
        """Choose among the candidates of rows of the same kinds."""
        if params[0].typical_p < 1.0:
            kept = candidates.typical(kept, self._column(asked.typical_p for asked in params))
        if params[0].do_sample:
            key = torch.tensor(keys, dtype=torch.int64, device=self._device).unsqueeze(-1)
            picked = (kept.values + noise.gumbel(key, kept.ids)).argmax(-1, keepdim=True)
        else:
            picked = _argmax(kept.values).unsqueeze(-1)
        logprobs = kept.values.log_softmax(-1)
        token_ids = kept.ids.gather(-1, picked).squeeze(-1).tolist()
        chosen = logprobs.gather(-1, picked).squeeze(-1).tolist()
        tops = [
            _best(logprobs[index], kept.ids[index], asked.top_n_tokens) if asked.top_n_tokens else []
            for index, asked in enumerate(params)
        ]
        return [
            Choice(token_id, _known(logprob), top)
            for token_id, logprob, top in zip(token_ids, chosen, tops, strict=True)
        ]

    def _column(self, values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=self._device).unsqueeze(-1)  # [rows, 1]


def _length(row: Row) -> int:
    """Tokens known of the row's sequence, which is also the position of the one to choose."""
    return row.position + len(row.token_ids)


def raw_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> list[float]:
    """The log probability of one token a row under the model's own logits, in float32.

    Args:
        logits: [n, vocab].
        token_ids: [n] int64.
    """
    found = [
        part.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        for part, ids in zip(logits.split(_LOGPROB_ROWS), token_ids.split(_LOGPROB_ROWS), strict=True)
    ]
    return [_known(value) for value in torch.cat(found).tolist()] if found else []


def _choose_plain(logits: torch.Tensor, states: Sequence[SamplingRow]) -> list[Choice]:
    if logits.device.type != "cpu" or not bool(logits.amax(-1).isfinite().all()):
        logits = logits.clone()
        processors.define(logits)
    picked = _argmax(logits)
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, picked.unsqueeze(-1)).squeeze(-1).tolist()
    return [
        Choice(
            token_id,
            _known(logprob),
            _best(line, None, state.params.top_n_tokens) if state.params.top_n_tokens else [],
        )
        for token_id, logprob, line, state in zip(picked.tolist(), chosen, logprobs, states, strict=True)
    ]


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest values of each row.

    On a CPU torch's argmax is not vectorised but its amax is: first the best block of a row, then the best in it.
    """
    rows, vocab = logits.shape
    blocks = vocab // _ARGMAX_BLOCK
    if logits.device.type != "cpu" or blocks < 2:
        return logits.argmax(-1)
    head = logits[:, : blocks * _ARGMAX_BLOCK].unflatten(-1, (blocks, _ARGMAX_BLOCK))
    peaks = head.amax(-1)  # [rows, blocks]
    peak, block = peaks.max(-1)
    inside = head[torch.arange(rows), block].argmax(-1)
    picked = block * _ARGMAX_BLOCK + inside
    if blocks * _ARGMAX_BLOCK == vocab:
        return picked
    tail, place = logits[:, blocks * _ARGMAX_BLOCK :].max(-1)
    return torch.where(tail > peak, blocks * _ARGMAX_BLOCK + place, picked)


def _best(logprobs: torch.Tensor, ids: torch.Tensor | None, count: int) -> list[tuple[int, float]]:
    """The ids not below the `count`-th best, best first and equal ones by id, at most four times `count`.

    What a filter removed is no alternative and is left out, so there can be fewer.

    Args:
        logprobs: [k].
        ids: [k]; None when they are the places.
    """
    most = _TIES * count
    values, places = logprobs.topk(min(most + 1, logprobs.shape[-1]))
    threshold = values[:count][-1].clamp_min(torch.finfo(logprobs.dtype).min)
    if len(places) > most and bool(values[-1] == threshold):
        # More ties than are reported: which of them stand in a topk is not defined, so take those with low ids.
        above = (logprobs > threshold).nonzero().squeeze(-1)
        tied = (logprobs == threshold).nonzero().squeeze(-1)
        places = torch.cat((above, tied[: most - len(above)]))
    else:
        places = places[values >= threshold]
    names = places if ids is None else ids[places]
    best = zip(names.tolist(), logprobs[places].tolist(), strict=True)
    return [(token_id, _known(logprob)) for token_id, logprob in sorted(best, key=lambda pair: (-pair[1], pair[0]))]


def _known(logprob: float) -> float:
    """Minus infinity where no probability was defined (a row without finite logits); never a negative zero."""
    return logprob + 0.0 if logprob == logprob else -torch.inf


def _waiting(states: Sequence[SamplingRow]) -> set[int]:
    """Places of the rows whose grammars are not compiled yet, after a moment's patience."""
    until = time.monotonic() + _PATIENCE_S
    return {
        index
        for index, state in enumerate(states)
        if state.kinds.masked and not state.settle_grammar(max(0.0, until - time.monotonic()))
    }


def _groups(states: Sequence[SamplingRow], waiting: set[int], at_once: int) -> list[list[int]]:
    """Places of the rows to choose for and not plain, put together by the work they need, `at_once` at most."""
    kinds: dict[Kinds, list[int]] = {}
    for index, state in enumerate(states):
        if not state.plain and state.fault is None and index not in waiting:
            kinds.setdefault(state.kinds, []).append(index)
    groups = []
    for kind, places in kinds.items():
        most = _GPU_ROWS if kind == _ONLY_MASKED else at_once
        groups += [places[start : start + most] for start in range(0, len(places), most)]
    return groups
