"""Granite 3 (IBM 2024): Llama whose embeddings, scores, residuals and logits have multipliers of their own.

Checkpoints: Granite 3.0 to 3.3, the dense ones.
"""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles
from serving.models.decoder import RotaryAttention, RotaryDecoder, Scaled, attend, gated_mlp, head, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Grouped-query attention over all earlier positions."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias),
        rotate=build.rotation(),
        attend=attend(config, build, scale=config.number("attention_multiplier", 1.0)),
        out=build.row("o_proj", bias=config.attention_bias),
    )


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm, multiplied and added to the residual stream."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.attention_norm = build.norm("input_layernorm", config.norm_eps)
        self.attention = attention(config, build.at("self_attn"))
        self.mlp_norm = build.norm("post_attention_layernorm", config.norm_eps)
        self.mlp = gated_mlp(config, build.at("mlp"))
        self.multiplier = config.number("residual_multiplier", 1.0)

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention(self.attention_norm(x), angles, batch) * self.multiplier
        return x + self.mlp(self.mlp_norm(x)) * self.multiplier


def granite(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.scaled_embedding("embed_tokens", config.vocab_size, config.number("embedding_multiplier", 1.0)),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, Block),
        norm=model.norm("norm", config.norm_eps),
        head=Scaled(head(config, build), 1 / config.number("logits_scaling", 1.0)),
    )
