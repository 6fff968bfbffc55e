"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745): attention and feed-forward side by side.

Checkpoints: GPT-NeoX-20B, Pythia, Dolly 2, RedPajama-INCITE, OpenAssistant's Pythia.
"""

from torch import nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import Mlp, ParallelBlock, PreNormBlock, RotaryAttention, RotaryDecoder, attend, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Attention whose checkpoint keeps query, key and value of each head together; a part of every head is turned."""
    return RotaryAttention(
        qkv=build.interleaved_column(
            "query_key_value", config.num_attention_heads, 1, 1, 1, bias=config.attention_bias
        ),
        rotate=build.partial_rotation(config.head_dim, config.rotary_dim),
        attend=attend(config, build),
        out=build.row("dense", bias=config.attention_bias),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    return Mlp(
        up=build.column("dense_h_to_4h", bias=True),
        activate=build.activation(config.hidden_act),
        down=build.row("dense_4h_to_h", bias=True),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer; a few checkpoints are of the ordinary, serial kind."""
    kind: type[nn.Module] = ParallelBlock if config.said["use_parallel_residual"] else PreNormBlock
    return kind(
        attention_norm=build.layer_norm("input_layernorm", config.norm_eps),
        attention=attention(config, build.at("attention")),
        mlp_norm=build.layer_norm("post_attention_layernorm", config.norm_eps),
        mlp=mlp(config, build.at("mlp")),
    )


def gpt_neox(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    model = build.at("gpt_neox")
    head = "embed_out" if build.has("embed_out.weight") else "lm_head"
    return RotaryDecoder(
        embed=model.embedding("embed_in", config.vocab_size),
        rotary=build.rotary(config.rotary_dim, config.rope),
        blocks=layers(config, model, block),
        norm=model.layer_norm("final_layer_norm", config.norm_eps),
        head=build.head(head, config.vocab_size, "gpt_neox.embed_in" if config.tie_word_embeddings else None),
    )
