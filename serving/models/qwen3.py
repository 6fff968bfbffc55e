"""Qwen3 (Yang et al. 2025, arXiv:2505.09388)."""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles
from serving.models.decoder import RotaryDecoder, attend
from serving.weights.model_config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised head by head before they are turned."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv = build.column("q_proj", "k_proj", "v_proj", bias=config.attention_bias)
        self.query_norm = build.norm("q_norm", config.rms_norm_eps)
        self.key_norm = build.norm("k_norm", config.rms_norm_eps)
        self.rotate = build.rotation()
        self.attend = attend(config, build, config.window(layer))
        self.out = build.row("o_proj", bias=config.attention_bias)

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        query, key = self.rotate(self.query_norm(query), angles), self.rotate(self.key_norm(key), angles)
        return self.out(self.attend(query, key, value, batch))


def qwen3(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return RotaryDecoder(config, build, Attention)
