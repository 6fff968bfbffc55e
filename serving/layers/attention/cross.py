"""Attention over another text than the one that is written: an encoder's, whose keys and values do not change any more.

By torch's `scaled_dot_product_attention` on every device; knows no rank and no number format.
"""

from functools import partial

from torch import Tensor, nn

from serving.layers.attention.backend import AttentionSpec
from serving.layers.attention.sdpa import attend, attend_groups
from serving.layers.forward_batch import CrossContext


class CrossAttention(nn.Module):
    """One layer's cross-attention. It only reads: whoever runs the encoder writes the keys and values."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, query: Tensor, context: CrossContext) -> Tensor:
        """query [tokens, heads, head_dim] -> [tokens, heads * head_dim]."""
        return attend_groups(partial(attend, self.spec), query, context, self.spec.layer)
