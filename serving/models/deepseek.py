"""DeepSeek V2 and V3 (DeepSeek-AI 2024, arXiv:2405.04434, arXiv:2412.19437): attention over latents, many experts.

Checkpoints: DeepSeek-V2, V2-Lite and V2.5, DeepSeek-Coder-V2, DeepSeek-V3, DeepSeek-R1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from serving.errors import ModelError
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.layers.rotary import Angles, sharpening
from serving.models.decoder import RotaryDecoder, SparseMlp, gated_mlp, head, layers, pre_norm_block
from serving.weights.model_config import ModelConfig

# Of the norms of latents, whatever config.json says of the others.
_LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention whose keys and values are made of one latent a token, which is all that the cache keeps.

    A score is a query times the matrix that turns latents into keys times a latent: the matrix is applied to the query,
    and the one for values to what was attended, so that no key or value of a head ever exists.
    """

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        plain, turned = config.count("qk_nope_head_dim"), config.count("qk_rope_head_dim")
        latent, value = config.count("kv_lora_rank"), config.count("v_head_dim")
        self.key_shares, self.latent_shares = (plain, turned), (latent, turned)
        self.query = query(config, build)
        self.latent = build.replicated("kv_a_proj_with_mqa", bias=config.attention_bias)
        self.norm = build.norm("kv_a_layernorm", _LATENT_EPS)
        self.into_latent, self.out_of_latent = build.latent_projections(
            "kv_b_proj", config.num_attention_heads, plain, value
        )
        self.rotate = build.pair_rotation() if turns_pairs(config) else build.rotation()
        self.attend = build.attention(
            heads=config.num_attention_heads, kv_heads=1, head_dim=latent + turned, scale=attention_scale(config),
            value_dim=latent,
        )  # fmt: skip
        self.out = build.row("o_proj", bias=config.attention_bias)

    def forward(self, x: Tensor, angles: Angles, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        plain, turned = self.query(x).unflatten(-1, (-1, sum(self.key_shares))).split(self.key_shares, -1)
        latent, key = self.latent(x).split(self.latent_shares, -1)
        query = torch.cat((self.into_latent(plain), self.rotate(turned, angles)), -1)
        key = torch.cat((self.norm(latent).unsqueeze(1), self.rotate(key.unsqueeze(1), angles)), -1)
        attended = self.attend(query, key, None, batch).unflatten(-1, (query.shape[1], -1))
        return self.out(self.out_of_latent(attended).flatten(1))


def query(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """From hidden states to queries; the large models go through a latent here, too."""
    if config.said.get("q_lora_rank") is None:
        return build.column("q_proj", heads=[config.num_attention_heads])
    return nn.Sequential(
        build.replicated("q_a_proj", bias=config.attention_bias),
        build.norm("q_a_layernorm", _LATENT_EPS),
        build.column("q_b_proj", heads=[config.num_attention_heads]),
    )


def turns_pairs(config: ModelConfig) -> bool:
    """Whether numbers that turn together are neighbours."""
    return config.model_type == "deepseek_v2" or bool(config.said["rope_interleave"])


def attention_scale(config: ModelConfig) -> float:
    """What scores are multiplied by: sharper where YaRN stretches the positions."""
    scale = (config.count("qk_nope_head_dim") + config.count("qk_rope_head_dim")) ** -0.5
    by = config.rope.get("mscale_all_dim")
    if config.rope["rope_type"] == "default" or not by:
        return scale
    return scale * sharpening(float(config.rope["factor"]), float(by)) ** 2


class SharedMixture(nn.Module):
    """A mixture beside experts that compute every token."""

    def __init__(self, *, mixture: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.mixture, self.shared = mixture, shared

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.mixture(x) + self.shared(x)


def router_v2(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Softmax over all experts, then the best of the best groups."""
    method = config.said["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"config.json: topk_method {method!r} is not served; known are greedy, group_limited_greedy")
    limited = method == "group_limited_greedy"
    return build.group_router(
        "gate", chosen=config.count("num_experts_per_tok"), groups=config.count("n_group") if limited else 1,
        chosen_groups=config.count("topk_group") if limited else 1, factor=config.number("routed_scaling_factor"),
    )  # fmt: skip


def router_v3(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """Every expert by itself, chosen with a bias that kept their loads even in training."""
    return build.biased_router(
        "gate", bias="e_score_correction_bias", chosen=config.count("num_experts_per_tok"),
        groups=config.count("n_group"), chosen_groups=config.count("topk_group"),
        normalized=bool(config.said["norm_topk_prob"]), factor=config.number("routed_scaling_factor"),
    )  # fmt: skip


def is_sparse(config: ModelConfig, layer: int) -> bool:
    """Whether this layer's feed-forward is a mixture."""
    return layer >= config.number("first_k_dense_replace") and layer % config.count("moe_layer_freq") == 0


def _model(
    config: ModelConfig, build: LayerBuilder, router: Callable[[ModelConfig, LayerBuilder], nn.Module]
) -> RotaryDecoder:
    def mixture(build: LayerBuilder) -> nn.Module:
        experts = build.at("experts").experts(
            config.count("num_experts"), gate="gate_proj", up="up_proj", down="down_proj", activation=config.hidden_act
        )
        return SharedMixture(
            mixture=SparseMlp(router=router(config, build), experts=experts),
            shared=gated_mlp(config, build.at("shared_experts")),
        )

    def block(config: ModelConfig, build: LayerBuilder, layer: int) -> nn.Module:
        mlp = mixture(build.at("mlp")) if is_sparse(config, layer) else gated_mlp(config, build.at("mlp"))
        return pre_norm_block(config, build, LatentAttention(config, build.at("self_attn")), mlp)

    model = build.at("model")
    return RotaryDecoder(
        embed=model.embedding("embed_tokens", config.vocab_size),
        rotary=build.rotary(config.count("qk_rope_head_dim"), config.rope),
        blocks=layers(config, model, block),
        norm=model.norm("norm", config.norm_eps),
        head=head(config, build),
    )


def deepseek_v2(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return _model(config, build, router_v2)


def deepseek_v3(config: ModelConfig, build: LayerBuilder) -> RotaryDecoder:
    """The whole model."""
    return _model(config, build, router_v3)
