"""The builder a model pulls its layers from: the one object that knows what a model must not know.

That is the checkpoint, the device, the number format, the kernels and the attention backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from serving.errors import ModelError
from serving.layers.activation import activation, make_gate
from serving.layers.attention.backend import Attention, AttentionMaker, AttentionSpec
from serving.layers.attention.kv_cache import KVShape
from serving.layers.embedding import Embedding, ScaledEmbedding
from serving.layers.linear import make_linear
from serving.layers.moe import Expert, Router, make_experts
from serving.layers.norm import HeadLayerNorm, LayerNorm, WideRMSNorm, make_rms_norm
from serving.layers.rotary import Rotary, Rotation, make_partial_rotation, make_rotation, rotate_pairs
from serving.weights.checkpoint import Checkpoint


@dataclass(slots=True)
class Built:
    """What a finished model needs from its runner.

    Attributes:
        kv_shapes: one an attention layer, in the order of their indices.
        windows: the distinct attention windows, for the masks.
        weight_bytes: bytes of all weights kept.
    """

    kv_shapes: list[KVShape] = field(default_factory=list)
    windows: set[int | None] = field(default_factory=set)
    weight_bytes: int = 0


class LayerBuilder:
    """Hands out layers by the checkpoint's names, scoped by `at`.

    Args:
        checkpoint: where tensors come from.
        dtype: what every weight is converted to.
        device: where every weight is kept.
        attention: makes all attention layers.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, attention: AttentionMaker
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._attention = checkpoint, dtype, device, attention
        self._prefix, self._transposed = "", False
        self.built = Built()

    def at(self, name: str) -> Self:
        """The same builder, one level deeper in the checkpoint's names."""
        deeper = object.__new__(type(self))
        deeper.__dict__.update(self.__dict__, _prefix=f"{self._prefix}{name}.")
        return deeper

    def transposed(self) -> Self:
        """The same builder for a checkpoint that keeps the weights of linear layers as [in, out]."""
        turned = object.__new__(type(self))
        turned.__dict__.update(self.__dict__, _transposed=True)
        return turned

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor here: old and new files of one family may differ in names."""
        return self._checkpoint.has(self._prefix + name)

    def column(self, *names: str, bias: bool = False) -> nn.Module:
        """Linear layers over one input, fused along their outputs in the order given. Raises ModelError."""
        weight = _joined([self._weight(name) for name in names])
        return make_linear(weight, _joined([self._tensor(f"{name}.bias") for name in names]) if bias else None)

    def fused_column(self, name: str, *sizes: int, bias: bool = False) -> nn.Module:
        """Linear layers over one input that the checkpoint keeps one below the other, `sizes` outputs each.

        Raises ModelError.
        """
        weight = self._weight(name)
        if len(weight) != sum(sizes):
            raise ModelError(f"{self._prefix}{name} has {len(weight)} outputs, but config.json says {sum(sizes)}")
        return make_linear(weight, self._tensor(f"{name}.bias") if bias else None)

    def interleaved_column(self, name: str, groups: int, *shares: int, bias: bool = False) -> nn.Module:
        """Linear layers over one input that the checkpoint keeps mixed: `groups` times a share of the outputs of each.

        Args:
            shares: how many heads of each layer a group holds, such as 1, 1, 1 for query, key and value.

        Returns:
            The layers' outputs side by side, as of `column`. Raises ModelError.
        """

        def sorted_out(tensor: Tensor) -> Tensor:
            if len(tensor) % (groups * sum(shares)):
                raise ModelError(f"{self._prefix}{name} has {len(tensor)} outputs, which config.json does not divide")
            parts = tensor.unflatten(0, (groups, sum(shares), -1)).split(shares, 1)
            return torch.cat([part.flatten(0, 2) for part in parts])

        return make_linear(sorted_out(self._weight(name)), sorted_out(self._tensor(f"{name}.bias")) if bias else None)

    def row(self, name: str, bias: bool = False) -> nn.Module:
        """A linear layer whose input a `column` layer made. Raises ModelError."""
        return self.column(name, bias=bias)

    def head(self, name: str, vocab_size: int, tied_to: str | None = None) -> nn.Module:
        """The layer from hidden states to logits; `tied_to` names the embedding whose weight it shares."""
        return make_linear(self._vocabulary(tied_to or name, vocab_size), None)

    def embedding(self, name: str, vocab_size: int) -> nn.Module:
        """A token embedding. Raises ModelError."""
        return Embedding(self._vocabulary(name, vocab_size))

    def position_embedding(self, name: str) -> nn.Module:
        """An embedding of positions that was learned. Raises ModelError."""
        return Embedding(self._tensor(f"{name}.weight"))

    def scaled_embedding(self, name: str, vocab_size: int, scale: float) -> nn.Module:
        """A token embedding times `scale`. Raises ModelError."""
        return ScaledEmbedding(self._vocabulary(name, vocab_size), scale)

    def norm(self, name: str, eps: float) -> nn.Module:
        """A root-mean-square norm. Raises ModelError."""
        return make_rms_norm(self._tensor(f"{name}.weight"), eps)

    def offset_norm(self, name: str, eps: float) -> nn.Module:
        """A root-mean-square norm whose weight is kept as its distance from one. Raises ModelError."""
        weight = self._tensor(f"{name}.weight")
        if weight.dtype == torch.float32:
            return make_rms_norm(1 + weight, eps)
        # One and a little more would lose the little in a narrow type.
        return WideRMSNorm(1 + weight.float(), eps)

    def layer_norm(self, name: str, eps: float, bias: bool = True) -> nn.Module:
        """A layer norm. Raises ModelError."""
        return LayerNorm(self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias") if bias else None, eps)

    def head_layer_norm(self, name: str, eps: float) -> nn.Module:
        """A layer norm of every head by itself. Raises ModelError."""
        return HeadLayerNorm(self._tensor(f"{name}.weight"), eps)

    def rotary(self, size: int, rope: Mapping[str, Any]) -> Rotary:
        """The rotary embedding of a model, for `size` numbers of every head. Raises ModelError."""
        return Rotary(size, rope, self._device)

    def rotation(self) -> Rotation:
        """The turning of queries and keys by the angles that `rotary` gives."""
        return make_rotation(self._device, self._dtype)

    def partial_rotation(self, head_dim: int, size: int) -> Rotation:
        """The same for the first `size` numbers of a head."""
        return self.rotation() if size == head_dim else make_partial_rotation(self._device, self._dtype, size)

    def pair_rotation(self) -> Rotation:
        """The same where numbers that turn together are neighbours."""
        return rotate_pairs

    def gate(self, name: str) -> Callable[[Tensor], Tensor]:
        """`activation(gate) * up` of the two side by side: [tokens, 2 * size] -> [tokens, size]. Raises ModelError."""
        return make_gate(name, self._device, self._dtype)

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """The elementwise function of this name. Raises ModelError."""
        return activation(name)

    def router(self, name: str, *, chosen: int, normalized: bool) -> nn.Module:
        """Chooses the experts of every token: shares and ids, each [tokens, chosen]. Raises ModelError."""
        return Router(self.column(name), chosen, normalized)

    def experts(self, count: int, *, gate: str, up: str, down: str, activation: str) -> nn.Module:
        """Gated feed-forwards, numbered from here on: x, shares and ids of a `router` -> [tokens, hidden].

        Raises ModelError.
        """
        numbered = [self.at(str(i)) for i in range(count)]
        return make_experts([Expert(at.column(gate, up), at.row(down)) for at in numbered], self.gate(activation))

    def attention(
        self, *, heads: int, kv_heads: int, head_dim: int, scale: float, window: int | None = None,
        softcap: float | None = None,
    ) -> Attention:  # fmt: skip
        """The next layer's causal attention over the paged cache; layers are numbered in the order of these calls."""
        layer = len(self.built.kv_shapes)
        self.built.kv_shapes.append(KVShape(kv_heads, head_dim))
        self.built.windows.add(window)
        return self._attention(
            AttentionSpec(
                layer=layer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
                softcap=softcap,
            )
        )  # fmt: skip

    def _vocabulary(self, name: str, size: int) -> Tensor:
        weight = self._tensor(f"{name}.weight")
        # Everything else fails loudly in the first forward; ids beyond a smaller table only when one comes along.
        if len(weight) != size:
            raise ModelError(f"{name}.weight has {len(weight)} rows, but config.json says vocab_size {size}")
        return weight

    def _weight(self, name: str) -> Tensor:
        """A linear layer's weight: [out, in], however it lies in the checkpoint."""
        weight = self._tensor(f"{name}.weight")
        return weight.t().contiguous() if self._transposed else weight

    def _tensor(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(self._prefix + name)
        # `copy`, or a float32 weight would stay a view of the mapped file and change with it.
        kept = tensor.to(device=self._device, dtype=self._dtype, copy=True)
        self.built.weight_bytes += kept.nbytes
        return kept


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
