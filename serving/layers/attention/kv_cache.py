"""The key and value tensors, in blocks.

Knows no sequence: whose tokens lie in which block is the words side's matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps of a token: a key of `heads * head_dim` numbers, and a value of as many.

    Attributes:
        keys_only: whether the values are a part of the keys, so that nothing is kept of them.
    """

    heads: int
    head_dim: int
    keys_only: bool = False


class KVCache:
    """Preallocated blocks of keys and values for every layer.

    Args:
        shapes: one a layer.
        block_count: blocks to allocate, the padding block 0 among them.
        block_size: tokens a block holds.

    Attributes:
        keys: a tensor a layer: [blocks, block_size, kv_heads, head_dim].
        values: likewise, or of no width where a layer keeps keys only.
    """

    def __init__(
        self, shapes: Sequence[KVShape], block_count: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Written once here, so that every page is really there: an operating system that hands memory out on
        # first use would otherwise refuse it in the middle of a request.
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for shape in shapes:
            size = (block_count, block_size, shape.heads, shape.head_dim)
            self.keys.append(torch.empty(size, dtype=dtype, device=device).zero_())
            width = 0 if shape.keys_only else shape.head_dim
            self.values.append(torch.empty((*size[:-1], width), dtype=dtype, device=device).zero_())

    def erase(self, slots: Tensor) -> None:
        """Make everything zero that is kept of some tokens.

        Args:
            slots: `block * block_size + offset` of each: [tokens].
        """
        for kept in (*self.keys, *self.values):
            kept.view(-1, *kept.shape[2:]).index_fill_(0, slots, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def block_bytes(shapes: Sequence[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    numbers = sum((1 if shape.keys_only else 2) * shape.heads * shape.head_dim for shape in shapes)
    return numbers * block_size * dtype.itemsize
