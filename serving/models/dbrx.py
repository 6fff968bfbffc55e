"""DBRX (Databricks 2024): clipped queries, keys and values, layer norms without biases, experts kept in one tensor.

Checkpoints: DBRX base and instruct.
"""

from torch import nn

from serving.errors import ModelError
from serving.layers.builder import LayerBuilder
from serving.models.decoder import Clipped, PreNormBlock, RotaryAttention, RotaryDecoder, SparseMlp, attend, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Grouped-query attention over all earlier positions."""
    qkv = build.fused_column("Wqkv", *(heads * config.head_dim for heads in config.qkv_heads), heads=config.qkv_heads)
    limit = config.said["attn_config"].get("clip_qkv")
    return RotaryAttention(
        qkv=qkv if limit is None else Clipped(qkv, limit),
        rotate=build.rotation(),
        attend=attend(config, build),
        out=build.row("out_proj"),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The mixture."""
    norm = config.said["ffn_config"].get("moe_normalize_expert_weights", 1)
    if norm not in (None, 1):
        raise ModelError(f"config.json: moe_normalize_expert_weights {norm!r} is not served; known are null and 1")
    return SparseMlp(
        router=build.router("router.layer", chosen=config.count("num_experts_per_tok"), normalized=norm is not None),
        experts=build.at("experts.mlp").stacked_experts(
            config.count("num_experts"), gate="w1", up="v1", down="w2", activation=config.hidden_act
        ),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    attended = build.at("norm_attn_norm")
    return PreNormBlock(
        attention_norm=attended.layer_norm("norm_1", config.norm_eps, bias=False),
        attention=attention(config, attended.at("attn")),
        mlp_norm=attended.layer_norm("norm_2", config.norm_eps, bias=False),
        mlp=mlp(config, build.at("ffn")),
    )


def dbrx(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("transformer")
    return RotaryDecoder(
        embed=model.embedding("wte", config.vocab_size),
        rotary=build.rotary(config.head_dim, config.rope),
        blocks=layers(config, model, block, "blocks"),
        norm=model.layer_norm("norm_f", config.norm_eps, bias=False),
        head=build.head("lm_head", config.vocab_size),
    )
