"""Paged attention by gathering blocks and torch's `scaled_dot_product_attention`: the slow twin of every backend.

Runs on every device; knows no rank and no number format.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from serving.layers.attention.backend import AttentionSpec
from serving.layers.forward_batch import AttentionGroup, ForwardBatch


class SdpaAttention(nn.Module):
    """One layer's attention."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.queries_per_kv = spec.heads // spec.kv_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch) -> Tensor:
        """See `Attention`."""
        keys, values = batch.keys[self.spec.layer], batch.values[self.spec.layer]
        keys.view(-1, *key.shape[1:]).index_copy_(0, batch.slots, key)
        values.view(-1, *value.shape[1:]).index_copy_(0, batch.slots, value)
        if len(batch.groups) == 1:
            return self._attend(query, keys, values, batch.groups[0])
        output = query.new_empty(len(query), self.spec.heads * self.spec.head_dim)
        for group in batch.groups:
            end = group.start + group.rows * group.query_length
            output[group.start : end] = self._attend(query[group.start : end], keys, values, group)
        return output

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
        spec, rows = self.spec, group.rows
        context = (rows, -1, spec.kv_heads, spec.head_dim)
        key = keys.index_select(0, group.blocks).view(context).transpose(1, 2)  # [rows, kv_heads, context, head_dim]
        value = values.index_select(0, group.blocks).view(context).transpose(1, 2)
        mask = group.masks[spec.window]
        if group.query_length == 1:
            # The heads that share a key stand side by side as if they were query tokens: nothing is repeated.
            grouped = query.view(rows, spec.kv_heads, self.queries_per_kv, spec.head_dim)
            return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=spec.scale).flatten(1)
        # One row: [kv_heads, queries_per_kv, tokens, head_dim], over keys and values that are broadcast, not repeated.
        grouped = query.unflatten(1, (spec.kv_heads, self.queries_per_kv)).permute(1, 2, 0, 3)
        key, value = (kv.transpose(0, 1).expand(-1, self.queries_per_kv, -1, -1) for kv in (key, value))
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=spec.scale)
        return attended.permute(2, 0, 1, 3).flatten(1)
