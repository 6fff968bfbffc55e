"""Gemma 3's language model (Gemma Team 2025, arXiv:2503.19786): windows with a rotation of their own, normed heads.

Checkpoints: Gemma 3 270M and 1B, which are text alone.
"""

from torch import Tensor, nn

from serving.errors import ModelError
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.models.decoder import NormedRotaryAttention, SoftCap, attend, head, layers
from serving.models.gemma2 import SandwichBlock
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention with norms of queries and keys."""
    return NormedRotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias),
        query_norm=build.offset_norm("q_norm", config.norm_eps),
        key_norm=build.offset_norm("k_norm", config.norm_eps),
        rotate=build.rotation(),
        attend=attend(config, build, config.window(layer), scale=config.number("query_pre_attn_scalar") ** -0.5),
        out=build.row("o_proj", bias=config.attention_bias),
    )


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    return SandwichBlock(config, build, attention(config, build.at("self_attn"), layer))


class Gemma3(nn.Module):
    """The whole model: layers that see everything turn by one set of angles, layers with a window by another."""

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        if config.said.get("use_bidirectional_attention"):
            raise ModelError("config.json: use_bidirectional_attention is for embeddings; text is generated causally")
        model = build.at("model")
        self.embed = model.scaled_embedding("embed_tokens", config.vocab_size, config.hidden_size**0.5)
        self.rotary = build.rotary(config.head_dim, config.rope)
        self.local_rotary = build.rotary(config.head_dim, config.local_rope)
        self.blocks = layers(config, model, block)
        self.is_local = [config.window(layer) is not None for layer in range(config.num_hidden_layers)]
        self.norm = model.offset_norm("norm", config.norm_eps)
        self.head = SoftCap(head(config, build), config.optional_number("final_logit_softcapping"))

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        x = self.embed(batch.input_ids)
        everywhere = self.rotary(batch.positions, x.dtype)
        nearby = self.local_rotary(batch.positions, x.dtype)
        for block, is_local in zip(self.blocks, self.is_local, strict=True):
            x = block(x, nearby if is_local else everywhere, batch)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(hidden).float()
