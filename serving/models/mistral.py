"""Mistral (Jiang et al. 2023, arXiv:2310.06825).

Checkpoints: Mistral 7B, Mistral Nemo, Mistral Small (text), Codestral, Mathstral, Zephyr.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import RotaryAttention, RotaryDecoder, attend, pre_norm_decoder
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention over a sliding window, where the checkpoint has one."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads),
        rotate=build.rotation(),
        attend=attend(config, build, config.window(layer)),
        out=build.row("o_proj"),
    )


def mistral(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return pre_norm_decoder(config, build, attention)
