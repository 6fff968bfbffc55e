"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656): norms behind the layers, and over all queries and all keys at once.

Checkpoints: OLMo 2 1B, 7B, 13B and 32B.
"""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles
from serving.models.decoder import RotaryDecoder, attend, gated_mlp, rotary_decoder
from serving.weights.model_config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised, all heads together, before they are turned."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=config.attention_bias)
        self.query_norm = build.split_norm("q_norm", config.norm_eps, heads=config.num_attention_heads)
        self.key_norm = build.split_norm("k_norm", config.norm_eps, heads=config.num_key_value_heads)
        self.rotate = build.rotation()
        self.attend = attend(config, build, config.window(layer))
        heads, kv_heads = self.attend.spec.heads, self.attend.spec.kv_heads
        self.sizes = [n * config.head_dim for n in (heads, kv_heads, kv_heads)]
        self.out = build.row("o_proj", bias=config.attention_bias)

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        query, key, value = self.qkv(x).split(self.sizes, -1)
        query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        return self.out(self.attend(self.rotate(query, angles), self.rotate(key, angles), value, batch))


class PostNormBlock(nn.Module):
    """Attention and feed-forward, each normalised before it is added to the residual stream."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, build.at("self_attn"), layer)
        self.attention_norm = build.norm("post_attention_layernorm", config.norm_eps)
        self.mlp = gated_mlp(config, build.at("mlp"))
        self.mlp_norm = build.norm("post_feedforward_layernorm", config.norm_eps)

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention_norm(self.attention(x, angles, batch))
        return x + self.mlp_norm(self.mlp(x))


def olmo2(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return rotary_decoder(config, build, PostNormBlock)
