"""Models to measure with: known shapes with random weights, written as ordinary Hugging Face directories.

Knows no engine and no runner; a real checkpoint's directory does as well wherever one of these is used.
"""

import itertools
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from serving.weights.model_config import ModelConfig

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000
    positions: int = 2048
    tied: bool = False
    rope: Mapping[str, Any] | None = None

    def config(self) -> dict[str, Any]:
        """config.json, in Hugging Face's names. No token ends a generation: lengths are to be exact."""
        return {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads,
            "intermediate_size": self.intermediate, "vocab_size": self.vocab,
            "max_position_embeddings": self.positions, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": self.tied, "attention_bias": False, "mlp_bias": False,
            "rope_parameters": dict(self.rope or {"rope_type": "default", "rope_theta": 10000.0}),
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=512, positions=512),
    "15m": Shape(hidden=256, layers=8, heads=8, kv_heads=4, intermediate=768, tied=True),
    "125m": Shape(hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2048),
    # TinyLlama, Llama-3.2-1B, Llama-3.1-8B
    "1.1b": Shape(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632),
    "1b": Shape(
        hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256, positions=131072, tied=True,
        rope=_LLAMA3_ROPE | {"factor": 32.0},
    ),
    "8b": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocab=128256, positions=131072,
        rope=_LLAMA3_ROPE | {"factor": 8.0},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one decoding step must move and compute, whatever the implementation.

    Attributes:
        weights: parameters read once a step; of the embedding table only a row a token is read, unless it is also
            the head.
        kv_values: numbers kept of each token, over all layers.
    """

    weights: int
    kv_values: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Traffic":
        """Count from a configuration; norms and biases are left out."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        attention = config.hidden_size * config.head_dim * 2 * (heads + kv_heads)
        mlp = 3 * config.hidden_size * config.intermediate_size
        weights = config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size
        return cls(weights, 2 * config.num_hidden_layers * kv_heads * config.head_dim)


def write_config(directory: Path, shape: Shape) -> None:
    """Write config.json alone: enough for `--load-format dummy`."""
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")


def write_checkpoint(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write a random model in bfloat16, with a tokenizer; the same seed gives the same weights."""
    torch.manual_seed(seed)
    fields = {key: value for key, value in shape.config().items() if key not in ("model_type", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    write_tokenizer(directory, shape.vocab)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a tokenizer in which every id beyond the special ones is a word of four letters and its space."""
    words = ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    texts = [*SPECIAL_TOKENS, *itertools.islice(words, vocab_size - len(SPECIAL_TOKENS))]
    backend = tokenizers.Tokenizer(WordLevel({text: i for i, text in enumerate(texts)}, unk_token=SPECIAL_TOKENS[0]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(_ROLES, SPECIAL_TOKENS, strict=True))}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


_ROLES = ("unk_token", "bos_token", "eos_token")
