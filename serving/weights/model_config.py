"""What a checkpoint says of itself: `config.json` and `generation_config.json`, read once into a frozen record.

Knows no tensor (the words side reads it too) and nothing that an operator said.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from serving.errors import ModelError

# What transformers takes for granted where an architecture's config.json leaves a key out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's configuration under Hugging Face's names.

    Attributes:
        head_dim: size of one attention head; `hidden_size / num_attention_heads` unless said.
        sliding_window: how many positions back a token looks, itself included; `None` looks at all.
        layer_types: per layer "full_attention" or "sliding_attention"; empty where the family has one kind.
        rope: the rotary parameters: `rope_type`, `rope_theta` and what the type needs.
        dtype: the checkpoint's own type name, such as "bfloat16"; `None` where it does not say.
        eos_token_ids: the union of what `config.json` and `generation_config.json` say.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: Mapping[str, Any] = field(hash=False)
    dtype: str | None
    eos_token_ids: frozenset[int]

    def window(self, layer: int) -> int | None:
        """The attention window of one layer."""
        if self.layer_types and self.layer_types[layer] != "sliding_attention":
            return None
        return self.sliding_window

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a checkpoint directory's configuration.

        Raises:
            ModelError: a file is missing or broken, or a key has no sensible value; the text names it.
        """
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a directory; give --model-id a directory that holds a model")
        said = _read_json(directory / "config.json", "; is this the directory of a Hugging Face model?")
        generation_file = directory / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        model_type = str(said.get("model_type", ""))
        if not model_type:
            raise ModelError(f"{directory.name}/config.json has no model_type")
        return cls._of({**_DEFAULTS.get(model_type, {}), **said}, model_type, _eos_ids(said) | _eos_ids(generation))

    @classmethod
    def _of(cls, said: Mapping[str, Any], model_type: str, eos_token_ids: frozenset[int]) -> Self:
        heads, hidden = _count(said, "num_attention_heads"), _count(said, "hidden_size")
        return cls(
            model_type=model_type,
            vocab_size=_count(said, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_count(said, "intermediate_size"),
            num_hidden_layers=_count(said, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_count(said, "num_key_value_heads", heads),
            head_dim=_count(said, "head_dim", hidden // heads),
            max_position_embeddings=_count(said, "max_position_embeddings", 2048),
            rms_norm_eps=float(said.get("rms_norm_eps", 1e-6)),
            hidden_act=str(said.get("hidden_act", "silu")),
            tie_word_embeddings=bool(said.get("tie_word_embeddings", False)),
            attention_bias=bool(said.get("attention_bias", False)),
            mlp_bias=bool(said.get("mlp_bias", False)),
            sliding_window=_window(said, model_type),
            layer_types=_layer_types(said, model_type),
            rope=_rope(said),
            dtype=said.get("dtype") or said.get("torch_dtype"),
            eos_token_ids=eos_token_ids,
        )


def _read_json(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist{hint}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return content


def _count(said: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = said.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _eos_ids(said: Mapping[str, Any]) -> frozenset[int]:
    value = said.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if isinstance(i, int) and i >= 0)


def _window(said: Mapping[str, Any], model_type: str) -> int | None:
    # Qwen names a window and switches it off beside it.
    if model_type.startswith("qwen") and not said.get("use_sliding_window", False):
        return None
    return None if said.get("sliding_window") is None else _count(said, "sliding_window")


def _layer_types(said: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    layers = _count(said, "num_hidden_layers")
    types = tuple(said.get("layer_types") or ())
    if types and len(types) != layers:
        raise ModelError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    if not types and model_type.startswith("qwen"):
        full = min(int(said.get("max_window_layers", 28)), layers)
        return ("full_attention",) * full + ("sliding_attention",) * (layers - full)
    return types


def _rope(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside an optional `rope_scaling`."""
    rope = dict(said.get("rope_parameters") or said.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", said.get("rope_theta", 10000.0))
    return rope
