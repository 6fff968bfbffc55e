"""Qwen3's mixtures of experts (Yang et al. 2025, arXiv:2505.09388).

Checkpoints: Qwen3-30B-A3B and 235B-A22B, Qwen3-Coder.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import RotaryDecoder, SparseMlp, gated_mlp, pre_norm_block, rotary_decoder
from serving.models.qwen3 import attention
from serving.weights.model_config import ModelConfig


def is_sparse(config: ModelConfig, layer: int) -> bool:
    """Whether this layer's feed-forward is a mixture."""
    if layer in (config.said.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % config.count("decoder_sparse_step") == 0


def sparse_mlp(config: ModelConfig, build: LayerBuilder) -> SparseMlp:
    """The mixture; the builder stands at the layer's `mlp`."""
    return SparseMlp(
        router=build.router(
            "gate", chosen=config.count("num_experts_per_tok"), normalized=bool(config.said.get("norm_topk_prob"))
        ),
        experts=build.at("experts").experts(
            config.count("num_experts"), gate="gate_proj", up="up_proj", down="down_proj", activation=config.hidden_act
        ),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    mlp = sparse_mlp if is_sparse(config, layer) else gated_mlp
    return pre_norm_block(config, build, attention(config, build.at("self_attn"), layer), mlp(config, build.at("mlp")))


def qwen3_moe(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return rotary_decoder(config, build, block)
