"""Paged attention as batched matrix products, for bfloat16 on a CPU, where oneDNN computes a whole batch in one call.

Held to its slow twin, `sdpa`, or `eager` for what `sdpa` cannot do; where the twin is the cheaper one, it is used.
Knows no rank and no number format.
"""

from functools import partial

import torch
from torch import Tensor, nn

from serving.layers.attention import eager, sdpa
from serving.layers.attention.backend import AttentionSpec
from serving.layers.attention.sdpa import SdpaAttention, added, attend_groups, gathered, write
from serving.layers.forward_batch import AttentionGroup, Context, ForwardBatch

# Measured on two cores with AVX-512 and bfloat16 instructions: below these, sdpa is the faster one.
_FEWEST_ROWS = 8
_FEWEST_QUERIES = 96
# The products hold heads x queries x context scores at once; longer chunks stay with sdpa, which holds a tile.
_MAX_SCORES = 1 << 24


class MatmulAttention(nn.Module):
    """One layer's attention."""

    padded_tokens = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.twin = partial(sdpa.attend if SdpaAttention.supports(spec) else eager.attend, spec)
        self.value_dim = spec.head_dim if spec.value_dim is None else spec.value_dim
        owner = torch.arange(spec.heads) * spec.kv_heads // spec.heads  # the key-value head of each query head
        own = (owner[:, None] == torch.arange(spec.kv_heads)).unsqueeze(-1)
        self.own = own.to(torch.bfloat16) * spec.scale  # [heads, kv_heads, 1]

    @staticmethod
    def supports(spec: AttentionSpec) -> bool:
        """See `AttentionBackend`."""
        return True

    def forward(self, query: Tensor, key: Tensor, value: Tensor | None, batch: ForwardBatch) -> Tensor:
        """See `Attention`."""
        write(key, value, batch, self.spec.layer)
        return attend_groups(self.attend, query, batch, self.spec.layer)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
        """One group's attention: query [tokens, heads, head_dim] -> [tokens, heads * size of a value]."""
        spec = self.spec
        scores = spec.heads * group.contexts[spec.reads].mask[:, :1].numel()
        if scores > _MAX_SCORES:
            return self.twin(query, keys, values, group)
        if group.query_length == 1 and group.rows >= _FEWEST_ROWS:
            return self._many_rows(query, keys, values, group)
        if group.query_length >= _FEWEST_QUERIES:
            return self._long_chunk(query, keys, values, group)
        return self.twin(query, keys, values, group)

    def _many_rows(self, query: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
        """Every query against the keys of all heads at once, zero where they are not its own: one product a row
        instead of one a row and head. The surplus arithmetic costs less than the calls it saves.
        """
        spec, rows, context = self.spec, group.rows, group.contexts[self.spec.reads]
        key, value = self._gathered(keys, values, context)
        key, value = (part.view(rows, -1, *part.shape[-2:]).flatten(2) for part in (key, value))
        spread = (query.unsqueeze(2) * self.own).view(rows, spec.heads, -1)
        scores = self._capped(torch.bmm(spread, key.transpose(1, 2))).add_(added(spec, context).flatten(1, 3))
        attended = torch.bmm(scores.softmax(-1), value)
        per_head = attended.view(rows, spec.kv_heads, -1, spec.kv_heads, self.value_dim)
        return per_head.diagonal(0, 1, 3).permute(0, 3, 1, 2).flatten(1)

    def _long_chunk(self, query: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
        """All queries that share a key-value head against its keys: one product a key-value head."""
        spec, tokens, context = self.spec, group.query_length, group.contexts[self.spec.reads]
        key, value = (part.flatten(0, 1).transpose(0, 1) for part in self._gathered(keys, values, context))
        grouped = query.unflatten(1, (spec.kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, queries_per_kv, tokens, dim]
        grouped = (grouped * spec.scale).flatten(1, 2)
        scores = self._capped(torch.bmm(grouped, key.transpose(1, 2))).unflatten(1, (-1, tokens))
        scores.add_(added(spec, context).squeeze(0))
        attended = torch.bmm(scores.softmax(-1).flatten(1, 2), value)
        return attended.unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1)

    def _gathered(self, keys: Tensor, values: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The blocks of both that are read, [blocks, block_size, kv_heads, size of one]."""
        key = gathered(keys, context)
        return key, gathered(values, context) if self.spec.value_dim is None else key[..., : self.spec.value_dim]

    def _capped(self, scores: Tensor) -> Tensor:
        cap = self.spec.softcap
        return scores if cap is None else scores.float().div_(cap).tanh_().mul_(cap).to(scores.dtype)
