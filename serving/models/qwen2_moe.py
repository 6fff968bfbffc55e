"""Qwen1.5's and Qwen2's mixtures of experts (Yang et al. 2024, arXiv:2407.10671): one expert is everybody's.

Checkpoints: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B.
"""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.models.decoder import RotaryAttention, RotaryDecoder, attend, gated_mlp, pre_norm_block, rotary_decoder
from serving.models.qwen3_moe import is_sparse, sparse_mlp
from serving.weights.model_config import ModelConfig


def attention(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """Grouped-query attention with biases on queries, keys and values; some layers may have a window."""
    return RotaryAttention(
        qkv=build.column("q_proj", "k_proj", "v_proj", heads=config.qkv_heads, bias=bool(config.said["qkv_bias"])),
        rotate=build.rotation(),
        attend=attend(config, build, config.window(layer)),
        out=build.row("o_proj"),
    )


class SharedMlp(nn.Module):
    """A mixture beside an expert that computes every token, by a share that the token decides."""

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        self.mixture = sparse_mlp(config, build)
        self.shared = gated_mlp(config, build.at("shared_expert"))
        self.share = build.replicated("shared_expert_gate")

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.mixture(x) + self.share(x).sigmoid() * self.shared(x)


def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
    """One layer."""
    mlp = SharedMlp if is_sparse(config, layer) else gated_mlp
    return pre_norm_block(config, build, attention(config, build.at("self_attn"), layer), mlp(config, build.at("mlp")))


def qwen2_moe(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return rotary_decoder(config, build, block)
