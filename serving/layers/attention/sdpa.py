"""Paged attention by gathering blocks and torch's `scaled_dot_product_attention`: the slow twin of every backend.

Runs on every device; knows no rank and no number format.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.layers.attention.backend import AttentionSpec
from serving.layers.forward_batch import AttentionGroup, Context, CrossContext, ForwardBatch

Attend = Callable[[Tensor, Tensor, Tensor, AttentionGroup], Tensor]


class SdpaAttention(nn.Module):
    """One layer's attention."""

    padded_tokens = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    @staticmethod
    def supports(spec: AttentionSpec) -> bool:
        """See `AttentionBackend`."""
        return spec.softcap is None and spec.value_dim is None

    def forward(self, query: Tensor, key: Tensor, value: Tensor | None, batch: ForwardBatch) -> Tensor:
        """See `Attention`."""
        write(key, value, batch, self.spec.layer)
        return attend_groups(partial(attend, self.spec), query, batch, self.spec.layer)


def write(key: Tensor, value: Tensor | None, batch: ForwardBatch, layer: int) -> None:
    """Put the new keys and values [tokens, kv_heads, head_dim] into the cache."""
    for cache, new in ((batch.keys[layer], key), (batch.values[layer], value)):
        if new is not None:
            cache.view(-1, *new.shape[1:]).index_copy_(0, batch.slots, new)


def attend_groups(attend: Attend, query: Tensor, context: ForwardBatch | CrossContext, layer: int) -> Tensor:
    """Let `attend` compute group after group.

    Args:
        attend: from a group's queries and the layer's whole cache to [tokens, heads * size of a value].
    """
    keys, values = context.keys[layer], context.values[layer]
    outputs = [
        attend(query[group.start : group.start + group.rows * group.query_length], keys, values, group)
        for group in context.groups
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def gathered(cache: Tensor, context: Context) -> Tensor:
    """The blocks that are read, row by row: [rows * blocks a row, block_size, kv_heads, head_dim]."""
    return cache.index_select(0, context.blocks)


def added(spec: AttentionSpec, context: Context) -> Tensor:
    """What is added to the scores: [rows, kv_heads, heads a key-value head, query_length, keys].

    The dimensions of heads are 1 where all are alike.
    """
    return context.mask.unsqueeze(1) if spec.bias is None else context.mask.unflatten(1, (spec.kv_heads, -1))


def attend(spec: AttentionSpec, query: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
    """One group's attention: query [tokens, heads, head_dim] -> [tokens, heads * head_dim]."""
    rows, queries_per_kv, context = group.rows, spec.heads // spec.kv_heads, group.contexts[spec.reads]
    shape = (rows, -1, spec.kv_heads, spec.head_dim)
    key = gathered(keys, context).view(shape).transpose(1, 2)  # [rows, kv_heads, context, head_dim]
    value = gathered(values, context).view(shape).transpose(1, 2)
    mask = added(spec, context)
    if group.query_length == 1:
        # The heads that share a key stand side by side as if they were query tokens: nothing is repeated.
        grouped, mask = query.view(rows, spec.kv_heads, queries_per_kv, spec.head_dim), mask.squeeze(3)
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=spec.scale).flatten(1)
    # One row: [kv_heads, queries_per_kv, tokens, head_dim], over keys and values that are broadcast, not repeated.
    grouped, mask = query.unflatten(1, (spec.kv_heads, queries_per_kv)).permute(1, 2, 0, 3), mask.squeeze(0)
    key, value = (kv.transpose(0, 1).expand(-1, queries_per_kv, -1, -1) for kv in (key, value))
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=spec.scale)
    return attended.permute(2, 0, 1, 3).flatten(1)
