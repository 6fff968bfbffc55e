"""Members that decoder families share: parts to take, not a framework to fill in.

Knows no rank, no number format, no kernel; no flag is added here for one family's sake.
"""

from typing import Protocol

from torch import Tensor, nn

from serving.layers.attention.backend import Attention
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles, Rotation
from serving.weights.model_config import ModelConfig


class AttentionMaker(Protocol):
    """A family's attention class."""

    def __call__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
        """The attention of one layer; the builder stands at its `self_attn`."""
        ...


def attend(config: ModelConfig, build: LayerBuilder, window: int | None = None) -> Attention:
    """Grouped-query attention of the configuration's shape, scaled by the root of the head's size."""
    return build.attention(
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        scale=config.head_dim**-0.5, window=window,
    )  # fmt: skip


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are turned by their positions, of parts that the family chose.

    Args:
        qkv: [tokens, hidden] -> queries, keys and values side by side.
        rotate: turns queries and keys by the angles of their positions.
        out: [tokens, heads * head_dim] -> [tokens, hidden].
    """

    def __init__(
        self, config: ModelConfig, *, qkv: nn.Module, rotate: Rotation, attend: Attention, out: nn.Module
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv, self.rotate, self.attend, self.out = qkv, rotate, attend, out

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        query_key, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), 1)
        query, key = self.rotate(query_key, angles).split((self.heads, self.kv_heads), 1)
        return self.out(self.attend(query, key, value, batch))


class GatedMlp(nn.Module):
    """The gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        self.gate_up = build.column("gate_proj", "up_proj", bias=config.mlp_bias)
        self.down = build.row("down_proj", bias=config.mlp_bias)
        self.gate = build.gate(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(self.gate(self.gate_up(x)))


class PreNormBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int, attention: AttentionMaker) -> None:
        super().__init__()
        self.attention_norm = build.norm("input_layernorm", config.rms_norm_eps)
        self.attention = attention(config, build.at("self_attn"), layer)
        self.mlp_norm = build.norm("post_attention_layernorm", config.rms_norm_eps)
        self.mlp = GatedMlp(config, build.at("mlp"))

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention(self.attention_norm(x), angles, batch)
        return x + self.mlp(self.mlp_norm(x))


class RotaryDecoder(nn.Module):
    """A causal language model of pre-norm blocks with rotary positions, under Llama's checkpoint names."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, attention: AttentionMaker) -> None:
        super().__init__()
        self.rotary = build.rotary(config.head_dim, config.rope)
        model = build.at("model")
        self.embed = model.embedding("embed_tokens", config.vocab_size)
        self.blocks = nn.ModuleList(
            PreNormBlock(config, model.at(f"layers.{layer}"), layer, attention)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = model.norm("norm", config.rms_norm_eps)
        tied_to = "model.embed_tokens" if config.tie_word_embeddings else None
        self.head = build.head("lm_head", config.vocab_size, tied_to)

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
