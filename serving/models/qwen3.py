"""Qwen3 (Yang et al. 2025, arXiv:2505.09388).

Checkpoints: Qwen3 0.6B to 32B, DeepSeek-R1-0528-Qwen3-8B.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import NormedRotaryAttention, RotaryDecoder, attend, pre_norm_decoder
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention with norms of queries and keys; upper layers may have a window."""
    return NormedRotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias),
        query_norm=build.norm("q_norm", config.norm_eps),
        key_norm=build.norm("k_norm", config.norm_eps),
        rotate=build.rotation(),
        attend=attend(config, build, config.window(layer)),
        out=build.row("o_proj", bias=config.attention_bias),
    )


def qwen3(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return pre_norm_decoder(config, build, attention)
