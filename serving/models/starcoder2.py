"""StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): rotary positions with layer norms and a plain feed-forward.

Checkpoints: StarCoder2 3B, 7B and 15B.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import Mlp, PreNormBlock, RotaryAttention, RotaryDecoder, attend, head, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention over a sliding window, where the checkpoint has one."""
    bias = bool(config.said["use_bias"])
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=bias),
        rotate=build.rotation(),
        attend=attend(config, build, config.window(layer)),
        out=build.row("o_proj", bias=bias),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    bias = bool(config.said["use_bias"])
    return Mlp(
        up=build.column("c_fc", bias=bias),
        activate=build.activation(config.hidden_act),
        down=build.row("c_proj", bias=bias),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return PreNormBlock(
        attention_norm=build.layer_norm("input_layernorm", config.norm_eps),
        attention=attention(config, build.at("self_attn"), layer),
        mlp_norm=build.layer_norm("post_attention_layernorm", config.norm_eps),
        mlp=mlp(config, build.at("mlp")),
    )


def starcoder2(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("model")
    return RotaryDecoder(
        embed=model.embedding("embed_tokens", config.vocab_size),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.layer_norm("norm", config.norm_eps),
        head=head(config, build),
    )
