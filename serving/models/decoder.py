"""Members that decoder families share: parts to take, not a framework to fill in.

Knows no rank, no number format, no kernel; no flag is added here for one family's sake.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from serving.layers.attention.backend import Attention
from serving.layers.attention.position_bias import PositionBias
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles, Rotary, Rotation
from serving.weights.model_config import ModelConfig


class BlockMaker(Protocol):
    """A family's way to make one layer, or the attention of one."""

    def __call__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
        """The builder stands at the layer's, or its attention's, names."""
        ...


def attend(
    config: ModelConfig, build: LayerBuilder, window: int | None = None, *,
    scale: float | None = None, softcap: float | None = None, bias: PositionBias | None = None,
) -> Attention:  # fmt: skip
    """Grouped-query attention of the configuration's shape, scaled by the root of the head's size unless said."""
    return build.attention(
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        scale=config.head_dim**-0.5 if scale is None else scale, window=window, softcap=softcap,
        bias=bias,
    )  # fmt: skip


class PlainAttention(nn.Module):
    """Attention whose queries and keys say nothing of positions: the embeddings do, or biases of the scores.

    Args:
        qkv: [tokens, hidden] -> queries, keys and values side by side.
        out: [tokens, heads * head_dim] -> [tokens, hidden].
    """

    def __init__(self, *, qkv: nn.Module, attend: Attention, out: nn.Module) -> None:
        super().__init__()
        self.heads, self.kv_heads = attend.spec.heads, attend.spec.kv_heads
        self.qkv, self.attend, self.out = qkv, attend, out

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        return self.out(self.attend(query, key, value, batch))


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are turned by their positions, of parts that the family chose.

    Args:
        qkv: [tokens, hidden] -> queries, keys and values side by side.
        rotate: turns queries and keys by the angles of their positions.
        out: [tokens, heads * head_dim] -> [tokens, hidden].
    """

    def __init__(self, *, qkv: nn.Module, rotate: Rotation, attend: Attention, out: nn.Module) -> None:
        super().__init__()
        self.heads, self.kv_heads = attend.spec.heads, attend.spec.kv_heads
        self.qkv, self.rotate, self.attend, self.out = qkv, rotate, attend, out

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        query_key, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), 1)
        query, key = self.rotate(query_key, angles).split((self.heads, self.kv_heads), 1)
        return self.out(self.attend(query, key, value, batch))


class NormedRotaryAttention(nn.Module):
    """Attention whose queries and keys are normalised head by head before they are turned.

    Args:
        qkv: [tokens, hidden] -> queries, keys and values side by side.
        query_norm: over the last dimension of [tokens, heads, head_dim].
        key_norm: likewise.
        rotate: turns queries and keys by the angles of their positions.
        out: [tokens, heads * head_dim] -> [tokens, hidden].
    """

    def __init__(
        self, *, qkv: nn.Module, query_norm: nn.Module, key_norm: nn.Module, rotate: Rotation, attend: Attention,
        out: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads = attend.spec.heads, attend.spec.kv_heads
        self.qkv, self.query_norm, self.key_norm = qkv, query_norm, key_norm
        self.rotate, self.attend, self.out = rotate, attend, out

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        query, key = self.rotate(self.query_norm(query), angles), self.rotate(self.key_norm(key), angles)
        return self.out(self.attend(query, key, value, batch))


class GatedMlp(nn.Module):
    """The gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, *, gate_up: nn.Module, gate: Callable[[Tensor], Tensor], down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.gate, self.down = gate_up, gate, down

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(self.gate(self.gate_up(x)))


class Mlp(nn.Module):
    """The plain feed-forward layer: up, bent, down."""

    def __init__(self, *, up: nn.Module, activate: Callable[[Tensor], Tensor], down: nn.Module) -> None:
        super().__init__()
        self.up, self.activate, self.down = up, activate, down

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(self.activate(self.up(x)))


class SparseMlp(nn.Module):
    """A feed-forward of many experts, of which a router chooses a few for every token."""

    def __init__(self, *, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.experts(x, *self.router(x))


class PreNormBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    As of every block here, `given` is what the attention takes besides: the batch, and before it the angles of a model
    with rotary positions.
    """

    def __init__(self, *, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention(self.attention_norm(x), *given)
        return x + self.mlp(self.mlp_norm(x))


class ParallelBlock(nn.Module):
    """Attention and feed-forward of the same input, each behind its own norm, both added to the residual stream."""

    def __init__(self, *, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return x + self.attention(self.attention_norm(x), *given) + self.mlp(self.mlp_norm(x))


class SharedNormBlock(nn.Module):
    """Attention and feed-forward of the same normalised input, both added to the residual stream."""

    def __init__(self, *, norm: nn.Module, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = norm, attention, mlp

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        normed = self.norm(x)
        return x + self.attention(normed, *given) + self.mlp(normed)


class Decoder(nn.Module):
    """A causal language model whose attention is not told of positions, of parts that the family chose.

    Args:
        embed: ids [tokens] -> [tokens, hidden].
        positions: learned, positions [tokens] -> [tokens, hidden]; `None` where biases of the scores tell them.
        blocks: each [tokens, hidden] -> [tokens, hidden], given the batch.
        norm: the last one.
        head: [rows, hidden] -> [rows, vocabulary].
    """

    def __init__(
        self, *, embed: nn.Module, positions: nn.Module | None = None, blocks: nn.ModuleList, norm: nn.Module,
        head: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed, self.positions, self.blocks, self.norm, self.head = embed, positions, blocks, norm, head

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        x = self.embed(batch.input_ids)
        if self.positions is not None:
            x = x + self.positions(batch.positions)
        for block in self.blocks:
            x = block(x, batch)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(hidden).float()


class RotaryDecoder(nn.Module):
    """A causal language model with rotary positions, of parts that the family chose.

    Args:
        embed: ids [tokens] -> [tokens, hidden].
        rotary: the angles of the positions, the same in every layer.
        blocks: each [tokens, hidden] -> [tokens, hidden], given the angles and the batch.
        norm: the last one.
        head: [rows, hidden] -> [rows, vocabulary].
    """

    def __init__(
        self, *, embed: nn.Module, rotary: Rotary, blocks: nn.ModuleList, norm: nn.Module, head: nn.Module
    ) -> None:
        super().__init__()
        self.embed, self.rotary, self.blocks, self.norm, self.head = embed, rotary, blocks, norm, head

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        x = self.embed(batch.input_ids)
        angles = self.rotary(batch.positions, x.dtype)
        for block in self.blocks:
            x = block(x, angles, batch)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(hidden).float()


class SoftCap(nn.Module):
    """A head whose logits are kept within `cap` of zero by a tangent; `None` leaves them."""

    def __init__(self, head: nn.Module, cap: float | None) -> None:
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary]."""
        logits = self.head(hidden)
        return logits if self.cap is None else (logits.float() / self.cap).tanh() * self.cap


class Scaled(nn.Module):
    """A head whose logits are multiplied by `factor`."""

    def __init__(self, head: nn.Module, factor: float) -> None:
        super().__init__()
        self.head, self.factor = head, factor

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary]."""
        return self.head(hidden) * self.factor


class Clipped(nn.Module):
    """A layer whose outputs are kept within `limit` of zero."""

    def __init__(self, layer: nn.Module, limit: float) -> None:
        super().__init__()
        self.layer, self.limit = layer, limit

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        return self.layer(x).clamp_(-self.limit, self.limit)


def gated_mlp(config: ModelConfig, build: LayerBuilder) -> GatedMlp:
    """The gated feed-forward under Llama's names; the builder stands at its `mlp`."""
    return GatedMlp(
        gate_up=build.column("gate_proj", "up_proj", bias=config.mlp_bias),
        gate=build.gate(config.hidden_act),
        down=build.row("down_proj", bias=config.mlp_bias),
    )


def body(build: LayerBuilder, embedding: str, *places: str) -> LayerBuilder:
    """The builder at the first of these places where the checkpoint has this embedding: files of one family differ."""
    there = (build.at(place) for place in places if build.at(place).has(f"{embedding}.weight"))
    return next(there, build.at(places[0]))


def layers(config: ModelConfig, model: LayerBuilder, block: BlockMaker, name: str = "layers") -> nn.ModuleList:
    """All blocks; `model` stands where the checkpoint has them under this name."""
    return nn.ModuleList(block(config, model.at(f"{name}.{i}"), i) for i in range(config.num_hidden_layers))


def head(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The layer to logits under Llama's names, tied to the embedding where the checkpoint says so."""
    return build.head("lm_head", config.vocab_size, "model.embed_tokens" if config.tie_word_embeddings else None)


def body_head(config: ModelConfig, build: LayerBuilder, model: LayerBuilder, embedding: str) -> nn.Module:
    """The layer to logits, tied to the body's embedding of this name where the checkpoint says so.

    Args:
        model: stands where the checkpoint has the body.
    """
    if config.tie_word_embeddings:
        return model.head(embedding, config.vocab_size, embedding)
    return build.head("lm_head", config.vocab_size)


def pre_norm_block(config: ModelConfig, build: LayerBuilder, attention: nn.Module, mlp: nn.Module) -> PreNormBlock:
    """A block with root-mean-square norms under Llama's names; the builder stands at the layer."""
    return PreNormBlock(
        attention_norm=build.norm("input_layernorm", config.norm_eps),
        attention=attention,
        mlp_norm=build.norm("post_attention_layernorm", config.norm_eps),
        mlp=mlp,
    )


def pre_norm_decoder(config: ModelConfig, build: LayerBuilder, attention: BlockMaker) -> RotaryDecoder:
    """A model of pre-norm blocks with gated feed-forwards and root-mean-square norms, under Llama's names."""

    def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
        attended = attention(config, build.at("self_attn"), layer)
        return pre_norm_block(config, build, attended, gated_mlp(config, build.at("mlp")))

    return rotary_decoder(config, build, block)


def rotary_decoder(config: ModelConfig, build: LayerBuilder, block: BlockMaker) -> RotaryDecoder:
    """A model of a family's own blocks, under Llama's names for the rest."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.embedding("embed_tokens", config.vocab_size),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.norm("norm", config.norm_eps),
        head=head(config, build),
    )
