"""The contract of an attention backend: what a layer says of itself, and what is built from it.

Knows no kernel.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from serving.layers.attention.position_bias import PositionBias, Reads
from serving.layers.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's attention.

    Attributes:
        layer: index into the batch's keys and values.
        scale: what scores are multiplied by, first of all.
        window: how many positions back a token looks, itself included; `None` looks at all.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask; `None` leaves them.
        value_dim: values are the first `value_dim` numbers of the keys and nothing is kept of them; `None` where
            they are kept for themselves, `head_dim` numbers each.
        bias: what is added to the scores by position, in the mask; not beside a window.
        causal: whether the masks hide what comes later, so that a kernel may leave it out unasked.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None = None
    value_dim: int | None = None
    bias: PositionBias | None = None
    causal: bool = True

    @property
    def reads(self) -> Reads:
        """Which of a group's contexts is the layer's."""
        return self.window if self.bias is None else self.bias


class Attention(Protocol):
    """A layer's attention over the paged cache; also writes the new keys and values into it.

    Attributes:
        spec: what it was made for; its heads are those of this rank.
        padded_tokens: whether it computes single tokens from rows that are padded to the same length, and so wants a
            `Context` of them; chunks have one always.
    """

    spec: AttentionSpec
    padded_tokens: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor | None, batch: ForwardBatch) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim].

        Where the spec has a `value_dim`, value is `None` and the result [tokens, heads * value_dim].
        """
        ...


class AttentionMaker(Protocol):
    """Makes a layer's attention by the first backend that can."""

    def __call__(self, spec: AttentionSpec) -> Attention:
        """Raises ConfigurationError where no backend can do what the spec asks."""
        ...


class AttentionBackend(AttentionMaker, Protocol):
    """One way to compute attention; implementations are the classes that `select` names."""

    @staticmethod
    def supports(spec: AttentionSpec) -> bool:
        """Whether this backend computes everything that the spec asks; `select` builds no layer where it does not."""
        ...
