"""GPT-2 (Radford et al. 2019): positions that were learned, layer norms, weights kept as [in, out]."""

from torch import Tensor, nn

from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.models.decoder import Mlp, attend
from serving.weights.model_config import ModelConfig


def attention_scale(config: ModelConfig, layer: int) -> float:
    """What scores are multiplied by."""
    scale = config.head_dim**-0.5 if config.said.get("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.said.get("scale_attn_by_inverse_layer_idx", False) else scale


class Attention(nn.Module):
    """Attention over all earlier positions."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.qkv = build.fused_column("c_attn", *[config.hidden_size] * 3, bias=True, heads=config.qkv_heads)
        self.attend = attend(config, build, scale=attention_scale(config, layer))
        self.out = build.row("c_proj", bias=True)

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.attend.spec.heads, -1)).unbind(1)
        return self.out(self.attend(query, key, value, batch))


def mlp(config: ModelConfig, build: LayerBuilder) -> nn.Module:
    """The feed-forward."""
    return Mlp(
        up=build.column("c_fc", bias=True),
        activate=build.activation(config.hidden_act),
        down=build.row("c_proj", bias=True),
    )


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, build: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.attention_norm = build.layer_norm("ln_1", config.norm_eps)
        self.attention = Attention(config, build.at("attn"), layer)
        self.mlp_norm = build.layer_norm("ln_2", config.norm_eps)
        self.mlp = mlp(config, build.at("mlp"))

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.attention(self.attention_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))


class Gpt2(nn.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig, build: LayerBuilder) -> None:
        super().__init__()
        build = build.transposed()
        # The first files on the hub have no prefix.
        prefix = "" if build.has("wte.weight") else "transformer."
        model = build.at("transformer") if prefix else build
        self.embed = model.embedding("wte", config.vocab_size)
        self.positions = model.position_embedding("wpe")
        self.blocks = nn.ModuleList(
            Block(config, model.at(f"h.{layer}"), layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = model.layer_norm("ln_f", config.norm_eps)
        self.head = build.head("lm_head", config.vocab_size, f"{prefix}wte" if config.tie_word_embeddings else None)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        x = self.embed(batch.input_ids) + self.positions(batch.positions)
        for block in self.blocks:
            x = block(x, batch)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(hidden).float()
