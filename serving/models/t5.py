"""T5, Flan-T5, mT5 and UMT5 (Raffel et al. 2019, arXiv:1910.10683): an encoder, and a decoder that looks at it.

Positions are a learned bias on the scores, scores are not scaled, norms have no mean and nothing has a bias.

Checkpoints: T5, T5 v1.1, Flan-T5, Flan-UL2, mT5, mT0, UMT5.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from serving.errors import ModelError
from serving.layers.attention.backend import Attention
from serving.layers.attention.position_bias import PositionBias
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import CrossContext, ForwardBatch
from serving.models.decoder import GatedMlp, Mlp, Scaled
from serving.weights.model_config import ModelConfig

# Files differ in which name of the one embedding they keep.
_EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


class SelfAttention(nn.Module):
    """Attention over the text itself: all of it in the encoder, what came before in the decoder."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, attend: Attention) -> None:
        super().__init__()
        self.qkv = build.column("q", "k", "v", heads=config.qkv_heads)
        self.attend = attend
        self.out = build.row("o")

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.attend.spec.heads, -1)).unbind(1)
        return self.out(self.attend(query, key, value, batch))


class CrossAttention(nn.Module):
    """The decoder's attention over what the encoder made of its text."""

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        heads, kv_heads, _ = config.qkv_heads
        self.query = build.column("q", heads=[heads])
        self.key_value = build.column("k", "v", heads=[heads, kv_heads])
        self.attend = build.cross_attention(heads=heads, kv_heads=kv_heads, head_dim=config.head_dim, scale=1.0)
        self.out = build.row("o")

    def keys_and_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] of the encoder -> two of [tokens, kv_heads, head_dim]."""
        key, value = self.key_value(encoded).unflatten(-1, (2, self.attend.spec.kv_heads, -1)).unbind(1)
        return key, value

    def forward(self, x: Tensor, context: CrossContext) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        query = self.query(x).unflatten(-1, (self.attend.spec.heads, -1))
        return self.out(self.attend(query, context))


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward: plain in the first T5, gated from version 1.1 on."""
    gated, _, name = str(config.said["feed_forward_proj"]).rpartition("-")
    if gated not in ("", "gated"):
        raise ModelError(f"config.json: feed_forward_proj {config.said['feed_forward_proj']!r} is not known")
    if not gated:
        return Mlp(up=build.column("wi"), activate=build.activation(name), down=build.row("wo"))
    gate = build.gate("gelu_new" if name == "gelu" else name)
    return GatedMlp(gate_up=build.column("wi_0", "wi_1"), gate=gate, down=build.row("wo"))


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, bias: PositionBias) -> None:
        super().__init__()
        attention, feed_forward = build.at("layer.0"), build.at("layer.1")
        attend = build.encoder_attention(**_shape(config), scale=1.0, bias=bias)
        self.attention_norm = attention.norm("layer_norm", config.norm_eps)
        self.attention = SelfAttention(config, attention.at("SelfAttention"), attend)
        self.mlp_norm = feed_forward.norm("layer_norm", config.norm_eps)
        self.mlp = mlp(config, feed_forward.at("DenseReluDense"))

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention(self.attention_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))


class DecoderBlock(nn.Module):
    """The same with cross-attention between the two."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, bias: PositionBias) -> None:
        super().__init__()
        attention, cross, feed_forward = (build.at(f"layer.{i}") for i in range(3))
        attend = build.attention(**_shape(config), scale=1.0, bias=bias)
        self.attention_norm = attention.norm("layer_norm", config.norm_eps)
        self.attention = SelfAttention(config, attention.at("SelfAttention"), attend)
        self.cross_norm = cross.norm("layer_norm", config.norm_eps)
        self.cross = CrossAttention(config, cross.at("EncDecAttention"))
        self.mlp_norm = feed_forward.norm("layer_norm", config.norm_eps)
        self.mlp = mlp(config, feed_forward.at("DenseReluDense"))

    def forward(self, x: Tensor, batch: ForwardBatch, context: CrossContext) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention(self.attention_norm(x), batch)
        x = x + self.cross(self.cross_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class T5(nn.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        table = next((name for name in _EMBEDDINGS if build.has(f"{name}.weight")), _EMBEDDINGS[0])
        encoder, decoder = build.at("encoder"), build.at("decoder")
        self.embed = build.embedding(table, config.vocab_size)
        self.encoder_blocks = nn.ModuleList(
            EncoderBlock(config, encoder.at(f"block.{i}"), bias)
            for i, bias in enumerate(_biases(config, encoder, config.num_hidden_layers, bidirectional=True))
        )
        self.encoder_norm = encoder.norm("final_layer_norm", config.norm_eps)
        layers = config.count("num_decoder_layers", config.num_hidden_layers)
        blocks = [
            DecoderBlock(config, decoder.at(f"block.{i}"), bias)
            for i, bias in enumerate(_biases(config, decoder, layers, bidirectional=False))
        ]
        self.decoder_blocks, self.crosses = nn.ModuleList(blocks), [block.cross for block in blocks]
        self.decoder_norm = decoder.norm("final_layer_norm", config.norm_eps)
        # Whether the head is the embedding's twin is told by the files alone: transformers writes that it is, always.
        head = build.head("lm_head", config.vocab_size, None if build.has("lm_head.weight") else table)
        self.head = Scaled(head, config.hidden_size**-0.5) if _scales_output(config) else head

    def encode(self, batch: ForwardBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """See `EncoderDecoder`."""
        x = self.embed(batch.input_ids)
        for block in self.encoder_blocks:
            x = block(x, batch)
        x = self.encoder_norm(x)
        for cross in self.crosses:
            yield cross.keys_and_values(x)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        assert batch.cross is not None
        x = self.embed(batch.input_ids)
        for block in self.decoder_blocks:
            x = block(x, batch, batch.cross)
        return self.decoder_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(hidden).float()


def _shape(config: ModelConfig) -> dict[str, int]:
    heads, kv_heads, _ = config.qkv_heads
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": config.head_dim}


def _biases(config: ModelConfig, build: LayerBuilder, layers: int, *, bidirectional: bool) -> Iterator[PositionBias]:
    """The bias of every layer: UMT5 has one in each, the others have that of the first in all."""
    own = layers if config.model_type == "umt5" else 1
    reach = config.count("relative_attention_max_distance")
    biases = [
        build.relative_bias(
            f"block.{i}.layer.0.SelfAttention.relative_attention_bias", reach=reach, bidirectional=bidirectional
        )
        for i in range(own)
    ]
    for i in range(layers):
        yield biases[min(i, own - 1)]


def _scales_output(config: ModelConfig) -> bool:
    """The first T5 shrank what enters its head; later ones do not, which is told by a head of their own."""
    if config.model_type == "mt5":
        return False
    return bool(config.said.get("scale_decoder_outputs", config.tie_word_embeddings))
