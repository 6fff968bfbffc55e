"""Phi-1, 1.5 and 2 (Li et al. 2023, arXiv:2309.05463): attention and feed-forward side by side, biases everywhere.

Checkpoints: Phi-1, Phi-1.5, Phi-2.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import (
    Mlp,
    NormedRotaryAttention,
    RotaryAttention,
    RotaryDecoder,
    SharedNormBlock,
    attend,
    layers,
)
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Grouped-query attention that turns a part of every head; queries and keys may be normalised."""
    qkv = build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=True)
    rotate = build.partial_rotation(config.head_dim, config.rotary_dim)
    attended, out = attend(config, build), build.row("dense", bias=True)
    if not config.said.get("qk_layernorm", False):
        return RotaryAttention(qkv=qkv, rotate=rotate, attend=attended, out=out)
    return NormedRotaryAttention(
        qkv=qkv,
        query_norm=build.layer_norm("q_layernorm", config.norm_eps),
        key_norm=build.layer_norm("k_layernorm", config.norm_eps),
        rotate=rotate,
        attend=attended,
        out=out,
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    return Mlp(
        up=build.column("fc1", bias=True),
        activate=build.activation(config.hidden_act),
        down=build.row("fc2", bias=True),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return SharedNormBlock(
        norm=build.layer_norm("input_layernorm", config.norm_eps),
        attention=attention(config, build.at("self_attn")),
        mlp=mlp(config, build.at("mlp")),
    )


def phi(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    tied_to = "model.embed_tokens" if config.tie_word_embeddings else None
    return RotaryDecoder(
        embed=model.embedding("embed_tokens", config.vocab_size),
        rotary=build.rotary(config.rotary_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.layer_norm("final_layernorm", config.norm_eps),
        head=build.head("lm_head", config.vocab_size, tied_to, bias=True),
    )
