"""One forward's inputs: tensors and nothing with behaviour.

Knows no sequence, no plan and no kernel.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """The keys that layers with one window or bias read: no block that lies wholly outside the window.

    Attributes:
        blocks: KV block ids, row by row: [rows * blocks a row].
        mask: what to add to the scores, the same for all heads or for each its own:
            [rows, 1 or heads, query_length, blocks a row * block_size].
    """

    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """What one attention call computes: one token each of many rows, their contexts padded, or a chunk of one row.

    Attributes:
        start: where the group's first token stands in the batch; its tokens are contiguous, row by row.
        rows: number of sequences; 1 where `query_length` is more than 1.
        query_length: query tokens of each.
        blocks: ids of all KV blocks, row by row: [rows * blocks a row].
        contexts: what is read, by `AttentionSpec.reads`; only for layers that want it (`Attention.padded_tokens`).
    """

    start: int
    rows: int
    query_length: int
    blocks: Tensor
    contexts: Mapping[Hashable, Context]


@dataclass(frozen=True, slots=True)
class CrossContext:
    """What a step's tokens see of another text: the one that their rows' encoder has read.

    Attributes:
        groups: cover all tokens of the step, in order; blocks and masks are those of the other text.
        keys: a tensor a layer with cross-attention: [blocks, block_size, kv_heads, head_dim].
        values: likewise.
    """

    groups: Sequence[AttentionGroup]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, flat.

    Attributes:
        input_ids: [tokens].
        positions: where each token stands in its sequence: [tokens].
        slots: where each token's key and value are kept, `block * block_size + offset`: [tokens].
        groups: cover all tokens, in order.
        keys: a tensor a layer: [blocks, block_size, kv_heads, head_dim].
        values: likewise.
        cross: what an encoder-decoder's decoder sees of the encoder; `None` for every other forward.
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    groups: list[AttentionGroup]
    keys: list[Tensor]
    values: list[Tensor]
    cross: CrossContext | None = None
