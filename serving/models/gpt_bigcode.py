"""StarCoder and SantaCoder (Li et al. 2023, arXiv:2305.06161): GPT-2 whose queries share one key and one value.

Checkpoints: StarCoder, StarCoderBase, SantaCoder, StarChat.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import Decoder, PlainAttention, attend
from serving.models.gpt2 import attention_scale, decoder
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Attention over all earlier positions; a checkpoint with a key for each query keeps those of a head together."""
    heads, kv_heads, _ = config.qkv_heads
    if build.has("kv_attn.weight"):
        qkv = build.column("q_attn", "kv_attn", heads=(heads, 1), bias=True)
    else:
        qkv = build.interleaved_column("c_attn", kv_heads, heads // kv_heads, 1, 1, bias=True)
    return PlainAttention(
        qkv=qkv,
        attend=attend(config, build, scale=attention_scale(config, layer)),
        out=build.row("c_proj", bias=True),
    )


def gpt_bigcode(config: ModelConfig, build: LayerBuilder) -> Decoder:
    """The whole model."""
    # SantaCoder's own files come from a variant of GPT-2.
    first = build.has("transformer.h.0.attn.kv_attn.weight")
    return decoder(config, build.transposed() if first else build, attention)
