"""OPT and Galactica (Zhang et al. 2022, arXiv:2205.01068): positions that were learned, from the third row on.

Checkpoints: OPT 125M to 66B, Galactica.
"""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.models.decoder import Decoder, Mlp, PlainAttention, PreNormBlock, attend, body, body_head, layers
from serving.weights.model_config import ModelConfig

# The table of positions has rows that other models of its authors kept for padding.
_PADDING_ROWS = 2


def attention(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Attention over all earlier positions."""
    bias = bool(config.said["enable_bias"])
    return PlainAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=bias),
        attend=attend(config, build),
        out=build.row("out_proj", bias=bias),
    )


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    bias = bool(config.said["enable_bias"])
    return Mlp(
        up=build.column("fc1", bias=bias),
        activate=build.activation(config.hidden_act),
        down=build.row("fc2", bias=bias),
    )


def norm(config: ModelConfig, build: LayerBuilder, name: str) -> nn.Module:
    """A layer norm, which may have learned nothing."""
    if config.said["layer_norm_elementwise_affine"]:
        return build.layer_norm(name, config.norm_eps)
    return build.bare_layer_norm(config.norm_eps)


class PostNormBlock(nn.Module):
    """Attention and feed-forward, each added to the residual stream, which is then normalised."""

    def __init__(self, *, attention: nn.Module, attention_norm: nn.Module, mlp: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, attention_norm
        self.mlp, self.mlp_norm = mlp, mlp_norm

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = self.attention_norm(x + self.attention(x, batch))
        return self.mlp_norm(x + self.mlp(x))


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer; the one of 350M normalises afterwards."""
    kind: type[nn.Module] = PreNormBlock if config.said["do_layer_norm_before"] else PostNormBlock
    return kind(
        attention_norm=norm(config, build, "self_attn_layer_norm"),
        attention=attention(config, build.at("self_attn")),
        mlp_norm=norm(config, build, "final_layer_norm"),
        mlp=mlp(config, build),
    )


def opt(config: ModelConfig, build: LayerBuilder) -> Decoder:
    """The whole model; that of 350M has narrow embeddings, which are projected to and from the hidden size."""
    model = body(build, "embed_tokens", "model.decoder", "decoder")
    narrow = (config.said.get("word_embed_proj_dim") or config.hidden_size) != config.hidden_size
    last = config.said["do_layer_norm_before"] and not config.said.get("_remove_final_layer_norm", False)
    embed = model.embedding("embed_tokens", config.vocab_size)
    return Decoder(
        embed=nn.Sequential(embed, model.replicated("project_in")) if narrow else embed,
        positions=model.position_embedding("embed_positions", config.max_position_embeddings, _PADDING_ROWS),
        blocks=layers(config, model, block),
        norm=nn.Sequential(
            norm(config, model, "final_layer_norm") if last else nn.Identity(),
            model.replicated("project_out") if narrow else nn.Identity(),
        ),
        head=body_head(config, build, model, "embed_tokens"),
    )
