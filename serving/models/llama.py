"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971).

Checkpoints: Llama 1, 2, 3, 3.1, 3.2 (text) and 3.3, Code Llama, Vicuna, TinyLlama, SmolLM and SmolLM2, Yi, DeepSeek
LLM and Coder, DeepSeek-R1-Distill-Llama.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import RotaryAttention, RotaryDecoder, attend, pre_norm_decoder
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention over all earlier positions, alike in every layer."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias),
        rotate=build.rotation(),
        attend=attend(config, build),
        out=build.row("o_proj", bias=config.attention_bias),
    )


def llama(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return pre_norm_decoder(config, build, attention)
