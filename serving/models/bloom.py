"""BLOOM (BigScience 2022, arXiv:2211.05100): linear biases instead of positions, a norm behind the embedding.

Checkpoints: BLOOM 560M to 176B, BLOOMZ.
"""

from torch import Tensor, nn

from serving.layers.attention.position_bias import PositionBias, alibi_slopes
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.models.decoder import Decoder, Mlp, PlainAttention, PreNormBlock, attend, body, body_head, layers
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, bias: PositionBias) -> nn.Module:
    """Attention whose checkpoint keeps query, key and value of each head together."""
    return PlainAttention(
        qkv=build.interleaved_column("query_key_value", config.num_attention_heads, 1, 1, 1, bias=True),
        attend=attend(config, build, bias=bias),
        out=build.row("dense", bias=True),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    return Mlp(
        up=build.column("dense_h_to_4h", bias=True),
        activate=build.activation(config.hidden_act),
        down=build.row("dense_4h_to_h", bias=True),
    )


class NormedResidualBlock(nn.Module):
    """Attention and feed-forward, each added to the normalised input that it was given."""

    def __init__(self, *, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = self.attention_norm(x)
        x = self.mlp_norm(x + self.attention(x, batch))
        return x + self.mlp(x)


def block(config: ModelConfig, build: LayerBuilder, bias: PositionBias) -> nn.Module:
    """One layer."""
    normed = config.said.get("apply_residual_connection_post_layernorm", False)
    kind: type[nn.Module] = NormedResidualBlock if normed else PreNormBlock
    return kind(
        attention_norm=build.layer_norm("input_layernorm", config.norm_eps),
        attention=attention(config, build.at("self_attention"), bias),
        mlp_norm=build.layer_norm("post_attention_layernorm", config.norm_eps),
        mlp=mlp(config, build.at("mlp")),
    )


def bloom(config: ModelConfig, build: LayerBuilder) -> Decoder:
    """The whole model."""
    # Files on the hub have no prefix; those that were saved again have one.
    model = body(build, "word_embeddings", "transformer", "")
    bias = build.linear_bias(alibi_slopes(config.num_attention_heads))
    return Decoder(
        embed=nn.Sequential(
            model.embedding("word_embeddings", config.vocab_size),
            model.layer_norm("word_embeddings_layernorm", config.norm_eps),
        ),
        blocks=layers(config, model, lambda config, build, _: block(config, build, bias), "h"),
        norm=model.layer_norm("ln_f", config.norm_eps),
        head=body_head(config, build, model, "word_embeddings"),
    )
