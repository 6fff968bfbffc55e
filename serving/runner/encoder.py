"""What the encoder of an encoder-decoder made of every row's text, kept from the row's start to its end.

Knows no sampling and no schedule.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from serving.layers.attention.kv_cache import KVCache, KVShape, block_bytes
from serving.layers.builder import Built
from serving.layers.forward_batch import AttentionGroup, Context, CrossContext, ForwardBatch
from serving.models.select import EncoderDecoder
from serving.plan import NewRow, Row
from serving.runner.inputs import MAX_GROUP_TOKENS, InputBuilder, Inputs


class _Text(NamedTuple):
    slot: int
    length: int


class EncoderStates:
    """The cross-attention keys and values of every row on the device, each row's in a slot for the longest text.

    A slot is a run of blocks, so that decoders read it as they read their own paged cache.

    Args:
        slots: what rows are given; the same one several times where only memory is measured.
        longest: tokens of the longest text.
        at_once: tokens that are encoded together, at least `longest`.
    """

    def __init__(
        self, model: EncoderDecoder, built: Built, *, slots: Sequence[int], longest: int, at_once: int,
        block_size: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._model, self._longest, self._at_once, self._block_size = model, longest, at_once, block_size
        self._dtype, self._device = dtype, device
        self._slot_blocks = -(-longest // block_size)
        self._cache = KVCache(built.cross_shapes, (max(slots) + 1) * self._slot_blocks, block_size, dtype, device)
        self._inputs = EncoderInputs(built, at_once, dtype, device)
        self._free = list(slots)
        self._texts: dict[int, _Text] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._cache.nbytes

    def reserve(self, sequence_id: int, length: int) -> None:
        """Give a row a slot without encoding anything. Raises ValueError for a text that does not fit one."""
        if not 0 < length <= self._longest:
            raise ValueError(f"a text of {length} tokens for an encoder that was measured with {self._longest}")
        self._texts[sequence_id] = _Text(self._free.pop(), length)

    def start(self, rows: Iterable[NewRow]) -> None:
        """Encode the texts of new rows; rows with the same text share the work."""
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row in rows:
            if row.encoder_token_ids:
                self.reserve(row.sequence_id, len(row.encoder_token_ids))
                sharing[tuple(row.encoder_token_ids)].append(row.sequence_id)
        for texts in self._parts(sharing):
            self._encode(texts, [sharing[text] for text in texts])

    def finish(self, sequence_id: int) -> None:
        """Forget a row; an unknown one is ignored."""
        text = self._texts.pop(sequence_id, None)
        if text is not None:
            self._free.append(text.slot)

    def build(self, inputs: InputBuilder, rows: Sequence[Row]) -> Inputs:
        """A decoder's batch with what its rows see of their texts; those with texts of like length stand together."""
        texts = [self._texts[row.sequence_id] for row in rows]
        made = inputs.build(rows, [text.length.bit_length() for text in texts])
        singles = sum(len(row.token_ids) == 1 for row in rows)  # they come first
        groups: list[AttentionGroup] = []
        for members in self._grouped([texts[i] for i in made.order[:singles]]):
            start = groups[-1].start + groups[-1].rows if groups else 0
            groups.append(self._group(start, members, 1))
        groups += (self._group(made.starts[i], [texts[i]], len(rows[i].token_ids)) for i in made.order[singles:])
        context = CrossContext(groups, self._cache.keys, self._cache.values)
        return replace(made, batch=replace(made.batch, cross=context))

    def _parts(self, texts: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """As many texts together as may be encoded at once."""
        part: list[tuple[int, ...]] = []
        for text in texts:
            if part and sum(map(len, part)) + len(text) > self._at_once:
                yield part
                part = []
            part.append(text)
        if part:
            yield part

    def _encode(self, texts: Sequence[tuple[int, ...]], owners: Sequence[list[int]]) -> None:
        source: list[int] = []
        target: list[int] = []
        start = 0
        for text, sequence_ids in zip(texts, owners, strict=True):
            for sequence_id in sequence_ids:
                slot = self._texts[sequence_id].slot * self._slot_blocks * self._block_size
                source += range(start, start + len(text))
                target += range(slot, slot + len(text))
            start += len(text)
        tokens, slots = self._tensor(source), self._tensor(target)
        for layer, pair in enumerate(self._model.encode(self._inputs.build(texts))):
            for cache, new in zip((self._cache.keys[layer], self._cache.values[layer]), pair, strict=True):
                cache.view(-1, *new.shape[1:]).index_copy_(0, slots, new[tokens])

    def _grouped(self, texts: Sequence[_Text]) -> Iterator[list[_Text]]:
        """Runs of texts that one attention call gathers, padded to the longest of them: at most to twice a text."""
        group: list[_Text] = []
        longest = 0
        for text in texts:
            longest = max(longest, text.length)
            alike = group and text.length.bit_length() == group[0].length.bit_length()
            if group and not (alike and (len(group) + 1) * longest <= MAX_GROUP_TOKENS):
                yield group
                group, longest = [], text.length
            group.append(text)
        if group:
            yield group

    def _group(self, start: int, texts: Sequence[_Text], query_length: int) -> AttentionGroup:
        width = -(-max(text.length for text in texts) // self._block_size)
        first = self._tensor([text.slot * self._slot_blocks for text in texts])
        blocks = (first[:, None] + torch.arange(width, device=self._device)).flatten()
        lengths = self._tensor([text.length for text in texts]).view(-1, 1, 1, 1)
        behind = torch.arange(width * self._block_size, device=self._device) >= lengths
        mask = torch.zeros(behind.shape, dtype=self._dtype, device=self._device).masked_fill_(behind, float("-inf"))
        return AttentionGroup(start, len(texts), query_length, blocks, {None: Context(blocks, mask)})

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class EncoderInputs:
    """Makes an encoder's batches of whole texts, in which every token sees its own text and no other.

    Args:
        tokens: the most of one batch.
    """

    def __init__(self, built: Built, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device, self._reads = dtype, device, built.encoder_reads
        # What a layer keeps of a batch is not needed by the next one: layers of one shape write to the same place. In
        # blocks of one token no text is padded.
        places = {shape: KVCache([shape], tokens, 1, dtype, device) for shape in set(built.encoder_shapes)}
        self._keys = [places[shape].keys[0] for shape in built.encoder_shapes]
        self._values = [places[shape].values[0] for shape in built.encoder_shapes]

    def build(self, texts: Sequence[Sequence[int]]) -> ForwardBatch:
        """One batch of all texts, one behind the other."""
        lengths = [len(text) for text in texts]
        positions = [torch.arange(length, device=self._device) for length in lengths]
        slots = torch.arange(sum(lengths), device=self._device)
        masks = self._masks(max(lengths))
        groups: list[AttentionGroup] = []
        start = 0
        for length, blocks in zip(lengths, slots.split(lengths), strict=True):
            contexts = {how: Context(blocks, mask[..., :length, :length]) for how, mask in masks.items()}
            groups.append(AttentionGroup(start, 1, length, blocks, contexts))
            start += length
        ids = torch.tensor([i for text in texts for i in text], dtype=torch.int64, device=self._device)
        return ForwardBatch(
            input_ids=ids, positions=torch.cat(positions), slots=slots, groups=groups, keys=self._keys,
            values=self._values,
        )  # fmt: skip

    def _masks(self, longest: int) -> dict[Hashable, Tensor]:
        """The masks of the longest text: those of the others are their corners."""
        positions = torch.arange(longest, device=self._device)
        masks: dict[Hashable, Tensor] = {}
        for how in self._reads:
            if how is None or isinstance(how, int):
                masks[how] = torch.zeros((1, 1, longest, longest), dtype=self._dtype, device=self._device)
            else:
                masks[how] = how(positions, positions[None]).to(self._dtype)
        return masks


def slot_bytes(shapes: Sequence[KVShape], longest: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one row's slot."""
    return -(-longest // block_size) * block_bytes(shapes, block_size, dtype)
