"""Every architecture at one small shape, and how many weights a decoding step of it reads.

Knows no runner: configurations are transformers', shapes of tensors are those of files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from serving.models.select import ARCHITECTURES
from serving.runner.dummy import file_shapes

# A step of an encoder-decoder is another thing.
NAMES = [name for name in sorted(ARCHITECTURES) if not AutoConfig.for_model(name).is_encoder_decoder]
SHAPE: Mapping[str, int] = {
    "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 12,
    "intermediate_size": 2048, "vocab_size": 4096,
}  # fmt: skip
# A feed-forward without a gate has two matrices in place of three: as many weights, more rows.
_PLAIN = {"intermediate_size": 3072}
_LATENT = {
    "kv_lora_rank": 256, "q_lora_rank": 384, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "moe_intermediate_size": 512, "n_routed_experts": 16, "num_experts_per_tok": 3, "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}  # fmt: skip
# A token's experts have together as many weights as Llama's feed-forward.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 12, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 1024, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "falcon": {"ffn_hidden_size": 3072, "multi_query": False},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "gpt2": _PLAIN,
    "gpt_bigcode": {"multi_query": False},
    "gpt_neox": _PLAIN,
    "mixtral": {"intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "phi": _PLAIN,
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512},
    "starcoder2": _PLAIN,
}  # fmt: skip
_MIXTURE = "chooses experts; two small products for each"
# What an architecture does that Llama does not, where that takes its time.
WHY: Mapping[str, str] = {
    "dbrx": _MIXTURE,
    "deepseek_v2": f"products to and from latents, wider scores; {_MIXTURE} and for a shared one",
    "deepseek_v3": f"products to and from latents, wider scores; {_MIXTURE} and for a shared one",
    "gemma2": "four norms a layer, capped scores",
    "gemma3_text": "four norms a layer and two of heads, a second rotation",
    "granite": "multipliers of residuals",
    "mixtral": _MIXTURE,
    "olmo2": "norms of all queries and keys",
    "qwen2_moe": f"{_MIXTURE} and for a shared one",
    "qwen3": "norms of every head's queries and keys",
    "qwen3_moe": f"norms of every head's queries and keys; {_MIXTURE}",
}


@dataclass(frozen=True, slots=True)
class StepWeights:
    """The parameters that decoding steps read.

    Attributes:
        always: those of every step.
        experts: those of all experts; a step reads the part that its tokens chose.
        chosen: how many experts a token chooses, of `count`.
    """

    always: int
    experts: int
    chosen: int
    count: int

    @classmethod
    def of(cls, directory: Path) -> "StepWeights":
        """Count for the config.json there. Of a table of embeddings a row a token is read, unless it is the head."""
        config = AutoConfig.from_pretrained(directory)
        shapes = file_shapes(directory)
        tied = not any(name.startswith(("lm_head.", "embed_out.")) for name in shapes)
        experts = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
        tables = sum(
            math.prod(shape) for name, shape in shapes.items()
            if name.endswith(_TABLES) and not (tied and shape[0] == config.vocab_size)
        )  # fmt: skip
        parts = (config, *(getattr(config, name) for name in ("ffn_config",) if hasattr(config, name)))
        return cls(
            always=sum(map(math.prod, shapes.values())) - experts - tables, experts=experts,
            chosen=_first(parts, "num_experts_per_tok", "moe_top_k"),
            count=_first(parts, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        )  # fmt: skip

    def read(self, batch: int) -> float:
        """Parameters that a step of `batch` tokens reads, if experts are chosen evenly."""
        return self.always + self.experts * (1 - (1 - self.chosen / self.count) ** batch)


_TABLES = ("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight", "embed_positions.weight", "wte.weight",
           "wpe.weight")  # fmt: skip


def write_config(directory: Path, name: str, positions: int) -> None:
    """Write config.json of an architecture at `SHAPE`: enough for `--load-format dummy`."""
    fields: dict[str, Any] = {
        **SHAPE, **_OWN.get(name, {}), "max_position_embeddings": positions, "tie_word_embeddings": False,
        "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    AutoConfig.for_model(name, **fields).save_pretrained(directory)


def _first(parts: tuple[Any, ...], *names: str) -> int:
    """The first of these that says anything; 1 where none does."""
    said = (getattr(part, name, None) for part in parts for name in names)
    return next((int(value) for value in said if value is not None), 1)
