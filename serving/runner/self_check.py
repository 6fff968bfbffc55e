"""Whether a model computes on the paged cache what it computes by itself: asked once, before it is served.

For models whose code is not ours, so that no list has to say which of them keep a state, look at their batch mates or
attend in a way of their own. Knows no class of them.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from serving.errors import ModelError
from serving.layers.attention.kv_cache import KVCache
from serving.layers.builder import Built
from serving.layers.forward_batch import ForwardBatch
from serving.models.select import FOREIGN_FAILURES, EncoderDecoder
from serving.plan import NewRow, Row
from serving.protocol import SamplingParams
from serving.runner.encoder import EncoderStates
from serving.runner.inputs import InputBuilder

_BLOCK_SIZE = 16
# Of the length of a token's logits, in all and beyond what a whole prompt differs by. Rounding stays well below.
_MOST_APART = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 1e-1}
_MOST_BEYOND = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
# Two sequences, and how far each is computed after every step: whatever a token needs from those before it besides keys
# and values is lost at each end.
_PIECES = ((7, 8, 9, 10, 11, 12, 23, 24), (1, 3, 8, 8, 8, 9, 9, 9))
# What an encoder reads for each of them, and for the row beside them: tokens.
_TEXTS = (19, 6, 1)


@runtime_checkable
class HasOracle(Protocol):
    """A model that also computes without our cache."""

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """See `CausalModel`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """See `CausalModel`."""
        ...

    def oracle(self, token_ids: Tensor, text: Tensor | None) -> Tensor:
        """[tokens] -> the logits of all of them, [tokens, vocabulary].

        Args:
            text: what an encoder reads, [tokens of it]; `None` where there is none.
        """
        ...


@torch.inference_mode()
def check(
    model: HasOracle, built: Built, *, vocab_size: int, longest: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare two short sequences, beside a row that ends where the longest sequence may.

    Raises:
        ModelError: they differ, or the model fails at it; the text says by how much, or how.
    """
    sequences = [_ids(n, j, vocab_size) for j, (*_, n) in enumerate(_PIECES)]
    texts = [_ids(n, 2 + j, vocab_size) for j, n in enumerate(_TEXTS)] if built.cross_shapes else []
    read: Sequence[Tensor | None] = [torch.tensor(text, device=device) for text in texts] or [None] * len(sequences)
    try:
        trial = _Trial(model, built, texts, longest, dtype, device)
        wanted = [
            model.oracle(torch.tensor(ids, device=device), text) for ids, text in zip(sequences, read, strict=False)
        ]
        whole = [trial.logits({j: ids}, {j: [len(ids)]})[0] for j, ids in enumerate(sequences)]
        pieces = trial.logits(dict(enumerate(sequences)), dict(enumerate(_PIECES)), beside=[trial.farthest()])
    except FOREIGN_FAILURES as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the model is not served: its code fails on a paged cache: {line}") from error
    if wanted[0].shape[-1] != vocab_size:
        raise ModelError(f"the model has {wanted[0].shape[-1]} logits, but config.json says vocab_size {vocab_size}")
    rounding = _apart(whole, wanted)
    if not rounding <= _MOST_APART[dtype]:
        raise ModelError(
            f"the model is not served: on a paged cache its logits come out {rounding:.1%} apart from those that it "
            "computes by itself"
        )
    lost = _apart(pieces, wanted)
    if not lost <= 2 * rounding + _MOST_BEYOND[dtype]:
        raise ModelError(
            f"the model is not served: in chunks and beside other rows its logits come out {lost:.1%} apart from those "
            "that it computes by itself; its layers keep more than keys and values, or look at the rest of a batch"
        )


def _ids(count: int, seed: int, vocab_size: int) -> list[int]:
    """Of the upper half: padding, to which some classes give no position, is mostly among the first."""
    return [vocab_size - 1 - (37 * i + 11 * (seed + 1)) % max(1, vocab_size // 2) for i in range(count)]


def _apart(computed: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The worse sequence's; by the median of its tokens, which forgives one whose experts a rounding has chosen."""
    return max(
        ((got - want).norm(dim=-1) / want.norm(dim=-1)).median().item()
        for got, want in zip(computed, wanted, strict=True)
    )


class _Trial:
    """The model on a small cache of its own."""

    def __init__(
        self, model: HasOracle, built: Built, texts: Sequence[list[int]], longest: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._model, self._longest, self._texts = model, longest, None
        cache = KVCache(built.kv_shapes, 6, _BLOCK_SIZE, dtype, device)
        self._inputs = InputBuilder(cache, _BLOCK_SIZE, built.reads, dtype, device, built.token_reads)
        if texts:
            self._texts = EncoderStates(
                cast(EncoderDecoder, model), built, slots=range(len(texts)), longest=max(map(len, texts)),
                at_once=sum(map(len, texts)), block_size=_BLOCK_SIZE, dtype=dtype, device=device,
            )  # fmt: skip
            self._texts.start(
                NewRow(sequence_id=i, token_ids=[0], prompt_length=1, sampling=SamplingParams(), encoder_token_ids=ids)
                for i, ids in enumerate(texts)
            )

    def farthest(self) -> Row:
        """A row that ends where the longest sequence may."""
        blocks = -(-self._longest // _BLOCK_SIZE)
        return Row(
            sequence_id=len(_PIECES), token_ids=[1], position=self._longest - 1, block_table=[4] * blocks, sample=True
        )

    def logits(
        self, sequences: Mapping[int, list[int]], ends: Mapping[int, Sequence[int]], beside: Sequence[Row] = ()
    ) -> list[Tensor]:
        """Every token's, of sequences that are computed up to these ends step by step, beside other rows."""
        tables = [[1, 2], [3]]
        computed, starts = {j: list[Tensor]() for j in sequences}, dict.fromkeys(sequences, 0)
        for step in zip(*(ends[j] for j in sequences), strict=True):
            until = dict(zip(sequences, step, strict=True))
            rows = [
                Row(
                    sequence_id=j, token_ids=ids[starts[j] : until[j]], position=starts[j], block_table=tables[j],
                    sample=True,
                )
                for j, ids in sequences.items()
                if until[j] > starts[j]
            ]  # fmt: skip
            together = [*rows, *beside]
            inputs = self._texts.build(self._inputs, together) if self._texts else self._inputs.build(together)
            logits = self._model.logits(self._model(inputs.batch))
            for row, start in zip(rows, inputs.starts, strict=False):
                computed[row.sequence_id].append(logits[start : start + len(row.token_ids)])
            starts = until
        return [torch.cat(parts) for parts in computed.values()]
