"""The contract of an attention backend: what a layer says of itself, and what is built from it.

Knows no kernel.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from serving.layers.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's causal attention.

    Attributes:
        layer: index into the batch's keys and values.
        window: how many positions back a token looks, itself included; `None` looks at all.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None


class Attention(Protocol):
    """A layer's attention over the paged cache; also writes the new keys and values into it."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]."""
        ...


class AttentionBackend(Protocol):
    """Makes a layer's attention; implementations are the classes that `select` names."""

    def __call__(self, spec: AttentionSpec) -> Attention:
        """Raises ConfigurationError where the backend cannot do what the spec asks."""
        ...
