"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219): Llama from fused tensors, a part of every head turned.

Checkpoints: Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import GatedMlp, RotaryAttention, RotaryDecoder, attend, head, layers, pre_norm_block
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention over a sliding window, where the checkpoint has one."""
    sizes = (heads * config.head_dim for heads in config.qkv_heads)
    return RotaryAttention(
        qkv=build.fused_column("qkv_proj", *sizes, heads=config.qkv_heads),
        rotate=build.partial_rotation(config.head_dim, config.rotary_dim),
        attend=attend(config, build, config.window(layer)),
        out=build.row("o_proj"),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The gated feed-forward."""
    return GatedMlp(
        gate_up=build.fused_column("gate_up_proj", config.intermediate_size, config.intermediate_size),
        gate=build.gate(config.hidden_act),
        down=build.row("down_proj"),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return pre_norm_block(config, build, attention(config, build.at("self_attn"), layer), mlp(config, build.at("mlp")))


def phi3(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.embedding("embed_tokens", config.vocab_size),
        rotary=build.rotary(config.rotary_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.norm("norm", config.norm_eps),
        head=head(config, build),
    )
