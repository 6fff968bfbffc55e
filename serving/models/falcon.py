"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867): three layouts of a layer, positions by rotation or by biases.

Checkpoints: Falcon 7B, 40B, 180B, Falcon-RW, Falcon 2 11B.
"""

from functools import partial

import torch
from torch import Tensor, nn

from serving.layers.attention.position_bias import PositionBias, alibi_slopes
from serving.layers.builder import LayerBuilder
from serving.models.decoder import (
    Decoder,
    Mlp,
    ParallelBlock,
    PlainAttention,
    PreNormBlock,
    RotaryAttention,
    RotaryDecoder,
    SharedNormBlock,
    attend,
    body_head,
    layers,
)
from serving.weights.model_config import ModelConfig


class CoarseBias:
    """Linear biases as Falcon computes them: each of a key's position alone and in bfloat16, whatever the model's type.

    Args:
        slopes: [heads].
        scale: biases are multiplied by it like the scores that they are added to.
    """

    def __init__(self, slopes: Tensor, *, scale: float) -> None:
        self.slopes, self.scale = slopes.bfloat16(), scale

    @property
    def heads(self) -> int:
        """See `PositionBias`."""
        return len(self.slopes)

    def __call__(self, keys: Tensor, queries: Tensor) -> Tensor:
        """See `PositionBias`."""
        # Less the query's own, which softmax cannot tell: the mask's type shall lose no more than was lost in training.
        of_keys, of_queries = (
            torch.outer(self.slopes, positions.flatten().bfloat16()).float() * self.scale
            for positions in (keys, queries)
        )
        of_queries = of_queries.unflatten(1, queries.shape).transpose(0, 1).unsqueeze(-1)
        return of_keys.unsqueeze(1) - of_queries


def attention(config: ModelConfig, build: LayerBuilder, bias: PositionBias | None) -> nn.Module:
    """Attention whose checkpoint keeps the queries that share a key together with it and its value."""
    heads, kv_heads, _ = config.qkv_heads
    biased = bool(config.said.get("bias", False))
    qkv = build.interleaved_column("query_key_value", kv_heads, heads // kv_heads, 1, 1, bias=biased)
    attended, out = attend(config, build, bias=bias), build.row("dense", bias=biased)
    if bias is not None:
        return PlainAttention(qkv=qkv, attend=attended, out=out)
    return RotaryAttention(qkv=qkv, rotate=build.rotation(), attend=attended, out=out)


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    biased = bool(config.said.get("bias", False))
    return Mlp(
        up=build.column("dense_h_to_4h", bias=biased),
        activate=build.activation(config.hidden_act),
        down=build.row("dense_4h_to_h", bias=biased),
    )


def block(config: ModelConfig, build: LayerBuilder, bias: PositionBias | None) -> nn.Module:
    """One layer: side by side behind two norms as in 40B, behind one as in 7B and 11B, or one after the other."""
    eps, attended = config.norm_eps, attention(config, build.at("self_attention"), bias)
    fed = mlp(config, build.at("mlp"))
    large = config.said.get("new_decoder_architecture", False)
    if large and config.number("num_ln_in_parallel_attn", 2) == 2:
        norms = {"attention_norm": build.layer_norm("ln_attn", eps), "mlp_norm": build.layer_norm("ln_mlp", eps)}
        return ParallelBlock(attention=attended, mlp=fed, **norms)
    norm = build.layer_norm("input_layernorm", eps)
    if large or config.said["parallel_attn"]:
        return SharedNormBlock(norm=norm, attention=attended, mlp=fed)
    mlp_norm = build.layer_norm("post_attention_layernorm", eps)
    return PreNormBlock(attention_norm=norm, attention=attended, mlp_norm=mlp_norm, mlp=fed)


def falcon(config: ModelConfig, build: LayerBuilder) -> Decoder | RotaryDecoder:
    """The whole model."""
    bias = None
    if config.said.get("alibi", False):
        scaled = partial(CoarseBias, scale=config.head_dim**-0.5)
        bias = build.linear_bias(alibi_slopes(config.num_attention_heads), scaled)
    model = build.at("transformer")
    embed = model.embedding("word_embeddings", config.vocab_size)
    blocks = layers(config, model, lambda config, build, _: block(config, build, bias), "h")
    norm = model.layer_norm("ln_f", config.norm_eps)
    head = body_head(config, build, model, "word_embeddings")
    if bias is not None:
        return Decoder(embed=embed, blocks=blocks, norm=norm, head=head)
    rotary = build.rotary(config.head_dim, config.rope)
    return RotaryDecoder(embed=embed, rotary=rotary, blocks=blocks, norm=norm, head=head)
