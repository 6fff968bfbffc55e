"""From a plan's rows to a forward's tensors.

Knows no model and no sampling.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from msgspec import structs
from torch import Tensor

from serving.layers.attention.kv_cache import KVCache
from serving.layers.attention.position_bias import Reads
from serving.layers.forward_batch import AttentionGroup, Context, ForwardBatch
from serving.plan import Row

# Rows of a group are padded to the longest of them; this bounds what one attention call gathers.
MAX_GROUP_TOKENS = 1 << 15
# A chunk's mask has query tokens x context entries, and so many times more where heads differ; longer chunks attend in
# slices, each of which gathers its context anew.
MAX_MASK_ENTRIES = 1 << 22
MAX_BIAS_ENTRIES = 1 << 24


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch and where its rows lie in it.

    Attributes:
        starts: for every row of the plan, the index of its first token in the batch.
        order: the rows of the plan as they stand in the batch.
    """

    batch: ForwardBatch
    starts: list[int]
    order: list[int]


def mask_bounds(reads: Iterable[Reads]) -> tuple[int, int]:
    """How many heads the largest mask is made for, and how many entries it has at most."""
    heads = max((1 if isinstance(how, int | None) else how.heads for how in reads), default=1)
    return heads, MAX_MASK_ENTRIES if heads == 1 else MAX_BIAS_ENTRIES


class InputBuilder:
    """Makes forward batches over one KV cache.

    Args:
        reads: the distinct ways in which the model's layers read (`AttentionSpec.reads`).
        dtype: the computing type, which the masks share.
        token_reads: those of layers that want single tokens padded; all of them unless said.
    """

    def __init__(
        self, cache: KVCache, block_size: int, reads: Iterable[Reads], dtype: torch.dtype, device: torch.device,
        token_reads: Iterable[Reads] | None = None,
    ) -> None:  # fmt: skip
        self._cache, self._block_size, self._reads = cache, block_size, tuple(reads)
        self._token_reads = self._reads if token_reads is None else tuple(token_reads)
        self._dtype, self._device = dtype, device
        self._mask_heads, self._mask_entries = mask_bounds(self._reads)

    def build(self, rows: Sequence[Row], classes: Sequence[int] | None = None) -> Inputs:
        """Single tokens first, sorted by length so that little is padded, then the chunks.

        Args:
            classes: of the rows, where it matters more that those of one class stand together.
        """
        singles = sorted((i for i, row in enumerate(rows) if len(row.token_ids) == 1), key=lambda i: -rows[i].position)
        chunks = [i for i, row in enumerate(rows) if len(row.token_ids) > 1]
        if classes is not None:
            singles.sort(key=classes.__getitem__)
            chunks.sort(key=classes.__getitem__)
        order = singles + chunks
        starts, token_ids, positions = [0] * len(rows), list[int](), list[int]()
        slots: list[int] = []
        for i in order:
            row, size = rows[i], self._block_size
            starts[i] = len(token_ids)
            token_ids += row.token_ids
            span = range(row.position, row.position + len(row.token_ids))
            positions += span
            slots += (row.block_table[p // size] * size + p % size for p in span)
        groups = [
            self._single_tokens([rows[i] for i in members], starts[members[0]])
            for members in self._group(rows, singles)
        ]
        for i in chunks:
            groups += self._chunk(rows[i], starts[i])
        batch = ForwardBatch(
            input_ids=self._tensor(token_ids), positions=self._tensor(positions), slots=self._tensor(slots),
            groups=groups, keys=self._cache.keys, values=self._cache.values,
        )  # fmt: skip
        return Inputs(batch, starts, order)

    def erase(self, inputs: Inputs, tokens: slice) -> None:
        """Make the keys and values zero that some tokens of a batch wrote."""
        self._cache.erase(inputs.batch.slots[tokens])

    def _group(self, rows: Sequence[Row], singles: Sequence[int]) -> list[list[int]]:
        """Split rows where their lengths do not fall, and where padding would double one or burst the bound."""
        if not self._token_reads:  # only their tables are padded
            return [list(singles)] if singles else []
        groups: list[list[int]] = []
        longest = 0
        for i in singles:
            blocks = self._blocks(rows[i].position + 1)
            full = groups and (len(groups[-1]) + 1) * longest * self._block_size > MAX_GROUP_TOKENS
            if not groups or full or not blocks <= longest <= 2 * blocks:
                groups.append([])
                longest = blocks
            groups[-1].append(i)
        return groups

    def _single_tokens(self, rows: Sequence[Row], start: int) -> AttentionGroup:
        return AttentionGroup(start, len(rows), 1, *self._read(rows, 1, self._token_reads))

    def _chunk(self, row: Row, start: int) -> list[AttentionGroup]:
        groups, done, count = [], 0, len(row.token_ids)
        slice_tokens = max(1, self._mask_entries // (self._mask_heads * (row.position + count)))
        while done < count:
            length = min(slice_tokens, count - done)
            part = structs.replace(row, position=row.position + done)
            groups.append(AttentionGroup(start + done, 1, length, *self._read([part], length, self._reads)))
            done += length
        return groups

    def _read(self, rows: Sequence[Row], length: int, reads: Iterable[Reads]) -> tuple[Tensor, dict[Hashable, Context]]:
        """All blocks of `length` tokens from each row's position on, and what layers that read so find there."""
        contexts: dict[Hashable, Context] = {how: self._context(rows, length, how) for how in reads}
        if None in contexts:
            return contexts[None].blocks, contexts
        return self._padded([row.block_table[: self._blocks(row.position + length)] for row in rows]), contexts

    def _context(self, rows: Sequence[Row], length: int, how: Reads) -> Context:
        window, bias = (how, None) if isinstance(how, int | None) else (None, how)
        size = self._block_size
        first = [0 if window is None else max(0, row.position + 1 - window) // size for row in rows]
        tables = [
            row.block_table[begin : self._blocks(row.position + length)] for row, begin in zip(rows, first, strict=True)
        ]
        blocks = self._padded(tables)
        # Positions of queries and keys both count from the first block that their row reads.
        queries = [row.position - begin * size for row, begin in zip(rows, first, strict=True)]
        positions = self._tensor(queries).view(-1, 1, 1, 1)
        if length > 1:
            positions = positions + torch.arange(length, device=self._device).view(-1, 1)
        keys = torch.arange(len(blocks) // len(rows) * size, device=self._device)
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, float("-inf"))
        return Context(blocks, mask if bias is None else bias(keys, positions[:, 0, :, 0]).to(self._dtype) + mask)

    def _padded(self, tables: Sequence[list[int]]) -> Tensor:
        width = max(map(len, tables))
        # Padding reads block 0, which nobody owns, behind the mask.
        return self._tensor(list(chain.from_iterable(table + [0] * (width - len(table)) for table in tables)))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
