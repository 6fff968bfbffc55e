"""Gemma, the first (Gemma Team 2024, arXiv:2403.08295): scaled embeddings, norms around one, wide heads.

Checkpoints: Gemma 2B and 7B, Gemma 1.1, CodeGemma.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import PreNormBlock, RotaryDecoder, gated_mlp, head, layers
from serving.models.llama import attention
from serving.weights.model_config import ModelConfig


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return PreNormBlock(
        attention_norm=build.offset_norm("input_layernorm", config.norm_eps),
        attention=attention(config, build.at("self_attn"), layer),
        mlp_norm=build.offset_norm("post_attention_layernorm", config.norm_eps),
        mlp=gated_mlp(config, build.at("mlp")),
    )


def gemma(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.scaled_embedding("embed_tokens", config.vocab_size, config.hidden_size**0.5),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.offset_norm("norm", config.norm_eps),
        head=head(config, build),
    )
