"""GPT-J (Wang and Komatsuzaki 2021): attention and feed-forward side by side, neighbours in a part of a head turned.

Checkpoints: GPT-J 6B.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import Mlp, RotaryAttention, RotaryDecoder, SharedNormBlock, attend, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Attention over all earlier positions."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads),
        rotate=build.partial_pair_rotation(config.head_dim, config.rotary_dim),
        attend=attend(config, build),
        out=build.row("out_proj"),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    return Mlp(
        up=build.column("fc_in", bias=True),
        activate=build.activation(config.hidden_act),
        down=build.row("fc_out", bias=True),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return SharedNormBlock(
        norm=build.layer_norm("ln_1", config.norm_eps),
        attention=attention(config, build.at("attn")),
        mlp=mlp(config, build.at("mlp")),
    )


def gptj(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("transformer")
    tied_to = "transformer.wte" if config.tie_word_embeddings else None
    return RotaryDecoder(
        embed=model.embedding("wte", config.vocab_size),
        rotary=build.rotary(config.rotary_dim, config.rope),
        blocks=layers(config, model, block, "h"),
        norm=model.layer_norm("ln_f", config.norm_eps),
        head=build.head("lm_head", config.vocab_size, tied_to, bias=True),
    )
