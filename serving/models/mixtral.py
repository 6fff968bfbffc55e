"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral whose feed-forwards are mixtures of experts.

Checkpoints: Mixtral 8x7B and 8x22B.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import RotaryDecoder, SparseMlp, pre_norm_block, rotary_decoder
from serving.models.mistral import attention
from serving.weights.model_config import ModelConfig


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The mixture."""
    return SparseMlp(
        router=build.router("gate", chosen=config.count("num_experts_per_tok"), normalized=True),
        experts=build.at("experts").experts(
            config.count("num_experts"), gate="w1", up="w3", down="w2", activation=config.hidden_act
        ),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    attended = attention(config, build.at("self_attn"), layer)
    return pre_norm_block(config, build, attended, mlp(config, build.at("block_sparse_moe")))


def mixtral(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return rotary_decoder(config, build, block)
