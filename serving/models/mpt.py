"""MPT (MosaicML 2023): linear biases instead of positions, few or no biases of layers.

Checkpoints: MPT 7B and 30B.
"""

from dataclasses import replace

from torch import nn

from serving.errors import ModelError
from serving.layers.attention.position_bias import PositionBias, alibi_slopes
from serving.layers.builder import LayerBuilder
from serving.models.decoder import (
    Clipped,
    Decoder,
    Mlp,
    PlainAttention,
    PreNormBlock,
    Scaled,
    attend,
    body_head,
    layers,
)
from serving.weights.model_config import ModelConfig

# What transformers computes in one way, whatever config.json says.
_SERVED = {"attn_type": "multihead_attention", "alibi": True, "qk_ln": False, "prefix_lm": False}


def of_attention(config: ModelConfig) -> ModelConfig:
    """The same with what config.json says of attention alone. Raises ModelError for what is not served."""
    said = config.said.get("attn_config") or {}
    if not isinstance(said, dict):
        raise ModelError(f"config.json: attn_config must be an object, not {said!r}")
    for key, served in _SERVED.items():
        if said.get(key, served) != served:
            raise ModelError(f"config.json: attn_config.{key} {said[key]!r} is not served for mpt, only {served!r}")
    return replace(config, said=said)


def attention(config: ModelConfig, build: LayerBuilder, bias: PositionBias) -> nn.Module:
    """Attention over all earlier positions."""
    own, biased = of_attention(config), build.has("Wqkv.bias")
    qkv = build.fused_column("Wqkv", *[config.hidden_size] * 3, bias=biased, heads=config.qkv_heads)
    limit = own.optional_number("clip_qkv")
    return PlainAttention(
        qkv=Clipped(qkv, limit) if limit else qkv,
        attend=attend(config, build, scale=own.optional_number("softmax_scale"), bias=bias),
        out=build.row("out_proj", bias=biased),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    bias = build.has("up_proj.bias")
    return Mlp(
        up=build.column("up_proj", bias=bias),
        activate=build.activation(config.hidden_act),
        down=build.row("down_proj", bias=bias),
    )


def norm(config: ModelConfig, build: LayerBuilder, name: str) -> nn.Module:
    """A layer norm, most often without a bias."""
    return build.layer_norm(name, config.norm_eps, bias=build.has(f"{name}.bias"))


def block(config: ModelConfig, build: LayerBuilder, bias: PositionBias) -> nn.Module:
    """One layer."""
    return PreNormBlock(
        attention_norm=norm(config, build, "norm_1"),
        attention=attention(config, build.at("attn"), bias),
        mlp_norm=norm(config, build, "norm_2"),
        mlp=mlp(config, build.at("ffn")),
    )


def mpt(config: ModelConfig, build: LayerBuilder) -> Decoder:
    """The whole model."""
    model = build.at("transformer")
    slopes = alibi_slopes(config.num_attention_heads, of_attention(config).number("alibi_bias_max", 8))
    bias = build.linear_bias(slopes)
    head, scale = body_head(config, build, model, "wte"), config.optional_number("logit_scale")
    return Decoder(
        embed=model.embedding("wte", config.vocab_size),
        blocks=layers(config, model, lambda config, build, _: block(config, build, bias), "blocks"),
        norm=norm(config, model, "norm_f"),
        head=head if scale is None else Scaled(head, scale),
    )
