"""The builder a model pulls its layers from: the one object that knows what a model must not know.

That is the checkpoint, the rank, the device, the number format, the kernels and the attention backend. Every tensor is
read once, and only this rank's part of it is copied, straight to where it stays.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from serving.errors import ModelError
from serving.layers.activation import activation, make_gate
from serving.layers.attention.backend import Attention, AttentionMaker, AttentionSpec
from serving.layers.attention.cross import CrossAttention
from serving.layers.attention.kv_cache import KVShape
from serving.layers.attention.position_bias import LinearBias, PositionBias, Reads, RelativeBias
from serving.layers.embedding import Embedding, Scaled, SplitEmbedding
from serving.layers.linear import HeadLinear, Linear, SplitHead, SummedLinear, WideLinear, make_linear
from serving.layers.lora import AdapterSlots, Part
from serving.layers.moe import BiasedRouter, GroupRouter, Router, SummedExperts, make_experts
from serving.layers.norm import HeadLayerNorm, LayerNorm, SplitRMSNorm, make_rms_norm, make_wide_rms_norm
from serving.layers.rank_weights import RankWeights
from serving.layers.rotary import (
    Rotary,
    Rotation,
    make_pair_rotation,
    make_partial_pair_rotation,
    make_partial_rotation,
    make_rotation,
)
from serving.parallel import OneRank, Ranks
from serving.weights.checkpoint import Checkpoint

Module = TypeVar("Module", bound=nn.Module)


@dataclass(slots=True)
class Built:
    """What a finished model needs from its runner.

    Attributes:
        kv_shapes: one an attention layer, in the order of their indices.
        reads: the distinct ways in which attention layers read (`AttentionSpec.reads`).
        token_reads: those of layers that want single tokens padded (`Attention.padded_tokens`).
        weight_bytes: bytes of all weights kept.
        tied_bytes: those of an embedding that is the head, too.
        encoder_shapes: one an attention layer of the encoder, where there is one.
        encoder_reads: the distinct ways in which those read.
        cross_shapes: one a cross-attention layer, in the order of their indices.
    """

    kv_shapes: list[KVShape] = field(default_factory=list)
    reads: set[Reads] = field(default_factory=set)
    token_reads: set[Reads] = field(default_factory=set)
    weight_bytes: int = 0
    tied_bytes: int = 0
    encoder_shapes: list[KVShape] = field(default_factory=list)
    encoder_reads: set[Reads] = field(default_factory=set)
    cross_shapes: list[KVShape] = field(default_factory=list)


class LayerBuilder:
    """Hands out layers by the checkpoint's names, scoped by `at`.

    Args:
        checkpoint: where tensors come from.
        dtype: what every weight is converted to.
        device: where every weight is kept.
        attention: makes all attention layers.
        ranks: those that share the model out among them.
        adapters: makes the linear layers of decoders adaptable; without it none is.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, attention: AttentionMaker,
        ranks: Ranks | None = None, adapters: AdapterSlots | None = None,
    ) -> None:  # fmt: skip
        self._dtype, self._device, self._attention = dtype, device, attention
        self._ranks: Ranks = ranks or OneRank()
        self._adapters = adapters
        built = self.built = Built()

        def count(nbytes: int) -> None:  # not a method: a circle would keep the builder, and tables that it holds
            built.weight_bytes += nbytes

        self._weights = RankWeights(checkpoint, dtype=dtype, device=device, ranks=self._ranks, on_kept=count)

    def at(self, name: str) -> Self:
        """The same builder, one level deeper in the checkpoint's names; the empty name stays where it is."""
        return self._over(self._weights.at(name))

    def transposed(self) -> Self:
        """The same builder for a checkpoint that keeps the weights of linear layers as [in, out]."""
        return self._over(self._weights.transposed())

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this tensor here: old and new files of one family may differ in names."""
        return self._weights.has(name)

    def column(self, *names: str, bias: bool = False, heads: Sequence[int] | None = None) -> nn.Module:
        """Linear layers over one input, fused along their outputs in the order given; ranks share the outputs out.

        Args:
            heads: how many heads the outputs of each are made of, which stay whole: the queries' are shared out, and
                where there are fewer of the others than ranks, several ranks keep the same one.

        Raises ModelError.
        """
        return self._column(names, lambda tensor: [tensor], bias=bias, heads=heads)

    def fused_column(self, name: str, *sizes: int, bias: bool = False, heads: Sequence[int] | None = None) -> nn.Module:
        """Linear layers over one input that the checkpoint keeps one below the other, `sizes` outputs each.

        Args:
            heads: see `column`.

        Raises ModelError.
        """

        def split(tensor: Tensor) -> Sequence[Tensor]:
            self._weights.check_outputs(name, tensor, sum(sizes))
            return tensor.split(sizes)

        return self._column([name], split, bias=bias, heads=heads)

    def interleaved_column(self, name: str, groups: int, *shares: int, bias: bool = False) -> nn.Module:
        """Linear layers over one input that the checkpoint keeps mixed: `groups` times a share of the outputs of each.

        Args:
            shares: how many heads of each layer a group holds, such as 1, 1, 1 for query, key and value.

        Returns:
            The layers' outputs side by side, as of `column`. Raises ModelError.
        """

        def sorted_out(tensor: Tensor) -> list[Tensor]:
            if len(tensor) % (groups * sum(shares)):
                raise ModelError(
                    f"{self._weights.full_name(name)} has {len(tensor)} outputs, which config.json does not divide"
                )
            parts = tensor.unflatten(0, (groups, sum(shares), -1)).split(shares, 1)
            return [part.flatten(0, 2) for part in parts]

        return self._column([name], sorted_out, bias=bias, heads=[groups * share for share in shares])

    def row(self, name: str, bias: bool = False) -> nn.Module:
        """A linear layer whose input a `column` layer made; ranks share the inputs out. Raises ModelError."""
        weight = self._weights.weight(name)
        columns = self._weights.own_inputs(name, weight)
        kept, offset = self._weights.kept([weight[:, columns]]), self._weights.tensor(f"{name}.bias") if bias else None
        if self._ranks.size == 1:
            return self._adapted(make_linear(kept, offset), [name], [weight], columns=columns)
        part = self._adapted(make_linear(kept, None), [name], [weight], columns=columns)
        return SummedLinear(part, offset, self._ranks)

    def replicated(self, name: str, bias: bool = False) -> nn.Module:
        """A linear layer that every rank computes whole. Raises ModelError."""
        weight = self._weights.weight(name)
        linear = make_linear(self._weights.kept([weight]), self._weights.tensor(f"{name}.bias") if bias else None)
        return self._adapted(linear, [name], [weight])

    def latent_projections(self, name: str, heads: int, key_dim: int, value_dim: int) -> tuple[nn.Module, nn.Module]:
        """The up-projection of multi-head latent attention, where each head's keys stand above its values.

        Returns:
            From queries to what they are to latents, [tokens, heads, key_dim] -> [tokens, heads, latent], and from
            attended latents to values, [tokens, heads, latent] -> [tokens, heads, value_dim]; ranks share the heads
            out. Raises ModelError.
        """
        weight = self._weights.weight(name)
        self._weights.check_outputs(name, weight, heads * (key_dim + value_dim))
        own = weight[self._weights.span(name, len(weight), heads, repeated=False)].unflatten(
            0, (-1, key_dim + value_dim)
        )
        # Apart: a product over matrices that lie within larger ones copies them first, every time.
        key, value = (self._weights.kept(part.unbind()) for part in own.split((key_dim, value_dim), 1))
        return HeadLinear(key.unflatten(0, (-1, key_dim))), HeadLinear(
            value.unflatten(0, (-1, value_dim)).transpose(1, 2)
        )

    def head(self, name: str, vocab_size: int, tied_to: str | None = None, bias: bool = False) -> nn.Module:
        """The layer from hidden states to logits; `tied_to` names the embedding whose weight it shares.

        Ranks share the vocabulary out; rank 0 alone has the logits. Raises ModelError.
        """
        weight = self._weights.vocabulary(tied_to or name, vocab_size)
        offset = (
            self._weights.kept([self._weights.split_vocabulary(self._weights.read(f"{name}.bias"))]) if bias else None
        )
        linear = make_linear(weight, offset)
        if tied_to is not None:
            self.built.tied_bytes = weight.nbytes
            if not isinstance(linear, Linear):
                self.built.weight_bytes += weight.nbytes  # laid out anew: a copy beside the embedding's
        return linear if self._ranks.size == 1 else SplitHead(linear, vocab_size, self._ranks)

    def embedding(self, name: str, vocab_size: int) -> nn.Module:
        """A token embedding; ranks share the vocabulary out. Raises ModelError."""
        weight = self._weights.vocabulary(name, vocab_size)
        return Embedding(weight) if self._ranks.size == 1 else SplitEmbedding(weight, self._ranks)

    def position_embedding(self, name: str, positions: int, skipped: int = 0) -> nn.Module:
        """An embedding of so many positions that was learned; its first rows may be skipped. Raises ModelError."""
        table = self._weights.read(f"{name}.weight")
        if len(table) < skipped + positions:
            raise ModelError(
                f"{self._weights.full_name(name)}.weight has {len(table)} rows, too few for the {positions} positions "
                "that config.json says"
            )
        return Embedding(self._weights.kept([table[skipped : skipped + positions]]))

    def scaled_embedding(self, name: str, vocab_size: int, scale: float) -> nn.Module:
        """A token embedding times `scale`. Raises ModelError."""
        return Scaled(self.embedding(name, vocab_size), scale, self._dtype)

    def norm(self, name: str, eps: float) -> nn.Module:
        """A root-mean-square norm. Raises ModelError."""
        return make_rms_norm(self._weights.tensor(f"{name}.weight"), eps)

    def split_norm(self, name: str, eps: float, *, heads: int) -> nn.Module:
        """A root-mean-square norm over all of these heads, which a `column` layer made. Raises ModelError."""
        if self._ranks.size == 1:
            return self.norm(name, eps)
        whole = self._weights.read(f"{name}.weight")
        weight = self._weights.kept([whole[self._weights.span(name, len(whole), heads, repeated=True)]])
        return SplitRMSNorm(weight, eps, self._ranks)

    def offset_norm(self, name: str, eps: float) -> nn.Module:
        """A root-mean-square norm whose weight is kept as its distance from one. Raises ModelError."""
        weight = self._weights.tensor(f"{name}.weight")
        if weight.dtype == torch.float32:
            return make_rms_norm(1 + weight, eps)
        # One and a little more would lose the little in a narrow type.
        return make_wide_rms_norm(1 + weight.float(), eps, self._dtype)

    def layer_norm(self, name: str, eps: float, bias: bool = True) -> nn.Module:
        """A layer norm. Raises ModelError."""
        return LayerNorm(
            self._weights.tensor(f"{name}.weight"), self._weights.tensor(f"{name}.bias") if bias else None, eps
        )

    def bare_layer_norm(self, eps: float) -> nn.Module:
        """A layer norm that has learned nothing."""
        return LayerNorm(None, None, eps)

    def head_layer_norm(self, name: str, eps: float) -> nn.Module:
        """A layer norm of every head by itself, heads being what a `column` layer made. Raises ModelError."""
        whole = self._weights.read(f"{name}.weight")
        return HeadLayerNorm(
            self._weights.kept([whole[self._weights.span(name, len(whole), len(whole), repeated=True)]]), eps
        )

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
        return make_pair_rotation(self._device, self._dtype)

    def partial_pair_rotation(self, head_dim: int, size: int) -> Rotation:
        """The same for the first `size` numbers of a head."""
        if size == head_dim:
            return self.pair_rotation()
        return make_partial_pair_rotation(self._device, self._dtype, size)

    def gate(self, name: str) -> Callable[[Tensor], Tensor]:
        """`activation(gate) * up` of the two side by side: [tokens, 2 * size] -> [tokens, size]. Raises ModelError."""
        return make_gate(name, self._device, self._dtype)

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """The elementwise function of this name. Raises ModelError."""
        return activation(name)

    def router(self, name: str, *, chosen: int, normalized: bool) -> nn.Module:
        """Chooses the experts of every token: shares and ids, each [tokens, chosen]. Raises ModelError."""
        return Router(self.replicated(name), chosen, normalized)

    def group_router(
        self, name: str, *, chosen: int, groups: int, chosen_groups: int, factor: float
    ) -> nn.Module:  # fmt: skip
        """The same among the best groups, in float32. Raises ModelError."""
        return GroupRouter(
            self._scores(name, groups), chosen=chosen, groups=groups, chosen_groups=chosen_groups, factor=factor
        )

    def biased_router(
        self, name: str, *, bias: str, chosen: int, groups: int, chosen_groups: int, normalized: bool, factor: float
    ) -> nn.Module:
        """The same for experts that are scored each by itself; `bias` stands below `name`. Raises ModelError."""
        return BiasedRouter(
            self._scores(name, groups), self._weights.tensor(f"{name}.{bias}", torch.float32), chosen=chosen,
            groups=groups, chosen_groups=chosen_groups, normalized=normalized, factor=factor,
        )  # fmt: skip

    def experts(self, count: int, *, gate: str, up: str, down: str, activation: str) -> nn.Module:
        """Gated feed-forwards, numbered from here on: x, shares and ids of a `router` -> [tokens, hidden].

        Every rank has a part of every expert. Raises ModelError.
        """
        numbered = (self.at(str(i)) for i in range(count))
        weights = (
            (
                at._weights.kept(at._weights.shares(gate, [at._weights.weight(gate), at._weights.weight(up)], None)),
                at._weights.row_weight(down),
            )
            for at in numbered
        )
        return self._mixture(weights, count, activation)

    def stacked_experts(self, count: int, *, gate: str, up: str, down: str, activation: str) -> nn.Module:
        """The same where one tensor holds every expert's layer below the one before, the last turned: [in, out].

        Raises ModelError.
        """
        gates, ups, downs = (self._weights.stacked(name, count) for name in (gate, up, down))
        rows = self._weights.span(down, len(downs[0]), len(downs[0]), repeated=False)
        weights = (
            (
                self._weights.kept(self._weights.shares(gate, [one_gate, one_up], None)),
                self._weights.kept([one_down[rows].t()]),
            )
            for one_gate, one_up, one_down in zip(gates, ups, downs, strict=True)
        )
        return self._mixture(weights, count, activation)

    def attention(
        self, *, heads: int, kv_heads: int, head_dim: int, scale: float, window: int | None = None,
        softcap: float | None = None, value_dim: int | None = None, bias: PositionBias | None = None,
    ) -> Attention:  # fmt: skip
        """The next layer's causal attention over the paged cache; layers are numbered in the order of these calls.

        Args:
            heads: all there are; those of this rank are in the layer's `spec`, as are its `kv_heads`.
        """
        heads, kv_heads = self._own_heads(heads, kv_heads)
        layer = len(self.built.kv_shapes)
        self.built.kv_shapes.append(KVShape(kv_heads, head_dim, keys_only=value_dim is not None))
        made = self._attention(
            AttentionSpec(
                layer=layer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
                softcap=softcap, value_dim=value_dim, bias=bias,
            )
        )  # fmt: skip
        self.built.reads.add(made.spec.reads)
        if made.padded_tokens:
            self.built.token_reads.add(made.spec.reads)
        return made

    def encoder_attention(
        self, *, heads: int, kv_heads: int, head_dim: int, scale: float, bias: PositionBias | None = None
    ) -> Attention:
        """The next encoder layer's attention: every token of a text sees the whole of it. As `attention` otherwise."""
        heads, kv_heads = self._own_heads(heads, kv_heads)
        layer = len(self.built.encoder_shapes)
        self.built.encoder_shapes.append(KVShape(kv_heads, head_dim))
        made = self._attention(
            AttentionSpec(
                layer=layer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=None, bias=bias,
                causal=False,
            )
        )  # fmt: skip
        self.built.encoder_reads.add(made.spec.reads)
        return made

    def cross_attention(self, *, heads: int, kv_heads: int, head_dim: int, scale: float) -> CrossAttention:
        """The next decoder layer's attention over what the encoder made of the row's text. As `attention` otherwise."""
        heads, kv_heads = self._own_heads(heads, kv_heads)
        layer = len(self.built.cross_shapes)
        self.built.cross_shapes.append(KVShape(kv_heads, head_dim))
        return CrossAttention(
            AttentionSpec(
                layer=layer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=None, causal=False
            )
        )

    def _own_heads(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """How many of them are this rank's."""
        return heads // self._ranks.size, max(1, kv_heads // self._ranks.size)

    def relative_bias(self, name: str, *, reach: int, bidirectional: bool) -> PositionBias:
        """A learned bias by the distance between key and query: the checkpoint has one number a bucket and head.

        Layers that are given the same object share its masks. Raises ModelError.
        """
        whole = self._weights.read(f"{name}.weight")
        heads = whole.shape[1]
        weight = self._weights.kept([whole[:, self._weights.span(name, heads, heads, repeated=False)]])
        return RelativeBias(weight, reach, bidirectional=bidirectional)

    def foreign(self, load: Callable[[Checkpoint, torch.dtype, torch.device], Module]) -> Module:
        """A module that takes the whole checkpoint by itself: code that is not ours.

        Args:
            load: puts it together in the type and on the device given.

        Raises ModelError, also where ranks would have to share it out.
        """
        if self._ranks.size > 1:
            raise ModelError(f"--num-shard {self._ranks.size}: a model without an architecture here is not shared out")
        module = load(self._weights.checkpoint, self._dtype, self._device)
        tensors = (*module.parameters(), *module.buffers())
        self.built.weight_bytes += sum(tensor.nbytes for tensor in tensors)
        return module

    def linear_bias(self, slopes: Sequence[float], make: Callable[[Tensor], PositionBias] = LinearBias) -> PositionBias:
        """Biases that fall with the distance by these slopes, one a head; or another kind that is made of slopes.

        Layers that are given the same object share its masks.
        """
        heads = len(slopes) // self._ranks.size
        first = self._ranks.rank * heads
        return make(torch.tensor(slopes[first : first + heads], dtype=torch.float32, device=self._device))

    def _over(self, weights: RankWeights) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _weights=weights)
        return other

    def _mixture(self, weights: Iterable[tuple[Tensor, Tensor]], count: int, activation: str) -> nn.Module:
        experts = make_experts(weights, count, self.gate(activation))
        return experts if self._ranks.size == 1 else SummedExperts(experts, self._ranks)

    def _column(
        self, names: Sequence[str], split: Callable[[Tensor], Sequence[Tensor]], *, bias: bool,
        heads: Sequence[int] | None,
    ) -> nn.Module:  # fmt: skip
        """`split` tells the layers apart that one of the checkpoint's tensors holds."""

        def own(tensors: Iterable[Tensor]) -> list[Tensor]:
            return self._weights.shares(names[0], [part for tensor in tensors for part in split(tensor)], heads)

        weights = [self._weights.weight(name) for name in names]
        offset = self._weights.kept(own(self._weights.read(f"{name}.bias") for name in names)) if bias else None
        return self._adapted(make_linear(self._weights.kept(own(weights)), offset), names, weights, own)

    def _adapted(
        self, linear: nn.Module, names: Sequence[str], weights: Sequence[Tensor],
        own: Callable[[Iterable[Tensor]], Sequence[Tensor]] = list, columns: slice | None = None,
    ) -> nn.Module:  # fmt: skip
        """The layer made ready for adapters, if there are to be any.

        Args:
            own: what is kept of the weights' outputs, in the layer's order; all of it unless said.
            columns: which inputs are kept; all of them unless said.
        """
        if self._adapters is None:
            return linear
        whole = torch.arange(sum(map(len, weights))).split([len(weight) for weight in weights])
        kept, parts, first = torch.cat(list(own(whole))), list[Part](), 0
        for name, weight, numbers in zip(names, weights, whole, strict=True):
            rows = kept[(kept >= numbers[0]) & (kept <= numbers[-1])] - numbers[0]
            outputs, inputs = slice(first, first + len(rows)), columns or slice(0, weight.shape[1])
            shape = (len(weight), weight.shape[1])
            parts.append(Part(self._weights.full_name(f"{name}.weight"), shape, outputs, rows, inputs))
            first += len(rows)
        return self._adapters.layer(linear, parts)

    def _scores(self, name: str, groups: int) -> nn.Module:
        weight = self._weights.tensor(f"{name}.weight", torch.float32)
        if len(weight) % groups:
            raise ModelError(f"config.json: {len(weight)} experts do not stand in {groups} groups")
        return WideLinear(weight)
