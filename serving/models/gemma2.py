"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms on both sides, every other layer a window, capped scores.

Checkpoints: Gemma 2 2B, 9B and 27B.
"""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles
from serving.models.decoder import RotaryAttention, RotaryDecoder, SoftCap, attend, gated_mlp, head, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention with capped scores."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias),
        rotate=build.rotation(),
        attend=attend(
            config, build, config.window(layer), scale=config.number("query_pre_attn_scalar") ** -0.5,
            softcap=config.optional_number("attn_logit_softcapping"),
        ),
        out=build.row("o_proj", bias=config.attention_bias),
    )  # fmt: skip


class SandwichBlock(nn.Module):
    """Attention and feed-forward, each between two norms, then added to the residual stream."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, attention: nn.Module) -> None:
        super().__init__()
        self.before_attention = build.offset_norm("input_layernorm", config.norm_eps)
        self.attention = attention
        self.after_attention = build.offset_norm("post_attention_layernorm", config.norm_eps)
        self.before_mlp = build.offset_norm("pre_feedforward_layernorm", config.norm_eps)
        self.mlp = gated_mlp(config, build.at("mlp"))
        self.after_mlp = build.offset_norm("post_feedforward_layernorm", config.norm_eps)

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.after_attention(self.attention(self.before_attention(x), angles, batch))
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return SandwichBlock(config, build, attention(config, build.at("self_attn"), layer))


def gemma2(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.scaled_embedding("embed_tokens", config.vocab_size, config.hidden_size**0.5),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.offset_norm("norm", config.norm_eps),
        head=SoftCap(head(config, build), config.optional_number("final_logit_softcapping")),
    )
