"""Paged attention with every score written out: the backend that can do all that a layer may ask for.

Slower than `sdpa` and held to it by what both can do. Runs on every device; knows no rank and no number format.
"""

from functools import partial

import torch
from torch import Tensor, nn

from serving.layers.attention.backend import AttentionSpec
from serving.layers.attention.sdpa import added, attend_groups, gathered, write
from serving.layers.forward_batch import AttentionGroup, ForwardBatch


class EagerAttention(nn.Module):
    """One layer's attention."""

    padded_tokens = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    @staticmethod
    def supports(spec: AttentionSpec) -> bool:
        """See `AttentionBackend`."""
        return True

    def forward(self, query: Tensor, key: Tensor, value: Tensor | None, batch: ForwardBatch) -> Tensor:
        """See `Attention`."""
        write(key, value, batch, self.spec.layer)
        return attend_groups(partial(attend, self.spec), query, batch, self.spec.layer)


def attend(spec: AttentionSpec, query: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
    """One group's attention: query [tokens, heads, head_dim] -> [tokens, heads * size of a value].

    Scores are in float32.
    """
    rows, shared, context = group.rows, spec.heads // spec.kv_heads, group.contexts[spec.reads]
    shape = (rows, -1, spec.kv_heads, spec.head_dim)
    key = gathered(keys, context).view(shape)
    value = gathered(values, context).view(shape) if spec.value_dim is None else key[..., : spec.value_dim]
    # [rows, kv_heads, head_dim, context] and [rows, kv_heads, context, size of a value]
    key, value = key.permute(0, 2, 3, 1), value.transpose(1, 2)
    # The heads that share a key stand below one another: [rows, kv_heads, shared * tokens, head_dim].
    grouped = query.view(rows, -1, spec.kv_heads, shared, spec.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = torch.matmul(grouped, key).float().mul_(spec.scale)
    if spec.softcap is not None:
        scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    scores = scores.unflatten(2, (shared, -1)).add_(added(spec, context))
    attended = torch.matmul(scores.softmax(-1).to(value.dtype).flatten(2, 3), value)
    return attended.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
