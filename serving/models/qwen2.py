"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671).

Checkpoints: Qwen1.5, Qwen2, Qwen2.5 and their Coder and Math, QwQ, DeepSeek-R1-Distill-Qwen.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import RotaryAttention, RotaryDecoder, attend, pre_norm_decoder
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention with biases on queries, keys and values; upper layers may have a window."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=True),
        rotate=build.rotation(),
        attend=attend(config, build, config.window(layer)),
        out=build.row("o_proj"),
    )


def qwen2(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return pre_norm_decoder(config, build, attention)
