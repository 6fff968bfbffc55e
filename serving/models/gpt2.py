"""GPT-2 (Radford et al. 2019): positions that were learned, layer norms, weights kept as [in, out].

Checkpoints: GPT-2, DistilGPT2, DialoGPT.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import (
    BlockMaker,
    Decoder,
    Mlp,
    PlainAttention,
    PreNormBlock,
    attend,
    body,
    body_head,
    layers,
)
from serving.weights.model_config import ModelConfig


def attention_scale(config: ModelConfig, layer: int) -> float:
    """What scores are multiplied by."""
    scale = config.head_dim**-0.5 if config.said.get("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.said.get("scale_attn_by_inverse_layer_idx", False) else scale


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Attention over all earlier positions."""
    return PlainAttention(
        qkv=build.fused_column("c_attn", *[config.hidden_size] * 3, bias=True, heads=config.qkv_heads),
        attend=attend(config, build, scale=attention_scale(config, layer)),
        out=build.row("c_proj", bias=True),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    return Mlp(
        up=build.column("c_fc", bias=True),
        activate=build.activation(config.hidden_act),
        down=build.row("c_proj", bias=True),
    )


def decoder(config: ModelConfig, build: LayerBuilder, attention: BlockMaker) -> Decoder:
    """A model under GPT-2's names with an attention of the family's own."""

    def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
        return PreNormBlock(
            attention_norm=build.layer_norm("ln_1", config.norm_eps),
            attention=attention(config, build.at("attn"), layer),
            mlp_norm=build.layer_norm("ln_2", config.norm_eps),
            mlp=mlp(config, build.at("mlp")),
        )

    # The first files on the hub have no prefix.
    model = body(build, "wte", "transformer", "")
    return Decoder(
        embed=model.embedding("wte", config.vocab_size),
        positions=model.position_embedding("wpe", config.max_position_embeddings),
        blocks=layers(config, model, block, "h"),
        norm=model.layer_norm("ln_f", config.norm_eps),
        head=body_head(config, build, model, "wte"),
    )


def gpt2(config: ModelConfig, build: LayerBuilder) -> Decoder:
    """The whole model."""
    return decoder(config, build.transposed(), attention)
