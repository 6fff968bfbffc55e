"""Command R (Cohere 2024): attention and feed-forward side by side behind one norm, neighbours turned together.

Checkpoints: Command R and R+, Aya 23, Aya Expanse.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import (
    NormedRotaryAttention,
    RotaryAttention,
    RotaryDecoder,
    Scaled,
    SharedNormBlock,
    attend,
    gated_mlp,
    head,
    layers,
)
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Grouped-query attention over all earlier positions; the large model normalises queries and keys."""
    qkv = build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias)
    out = build.row("o_proj", bias=config.attention_bias)
    rotate, attended = build.pair_rotation(), attend(config, build)
    if not config.said.get("use_qk_norm", False):
        return RotaryAttention(qkv=qkv, rotate=rotate, attend=attended, out=out)
    return NormedRotaryAttention(
        qkv=qkv,
        query_norm=build.head_layer_norm("q_norm", config.norm_eps),
        key_norm=build.head_layer_norm("k_norm", config.norm_eps),
        rotate=rotate,
        attend=attended,
        out=out,
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return SharedNormBlock(
        norm=build.layer_norm("input_layernorm", config.norm_eps, bias=False),
        attention=attention(config, build.at("self_attn")),
        mlp=gated_mlp(config, build.at("mlp")),
    )


def cohere(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.embedding("embed_tokens", config.vocab_size),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.layer_norm("norm", config.norm_eps, bias=False),
        head=Scaled(head(config, build), config.number("logit_scale")),
    )
