"""What a checkpoint says of itself: `config.json` and `generation_config.json`, read once into a frozen record.

Knows no tensor (the words side reads it too) and nothing that an operator said.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from serving.errors import ModelError
from serving.weights.families import DEFAULTS, NAMES, TOO_WIDE_FOR_FLOAT16

# What a file may ask for is bounded before it is used to allocate.
MOST_LAYERS = 10_000
MOST_POSITIONS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model's configuration under Hugging Face's names; of an encoder-decoder it tells what both have in common.

    Attributes:
        head_dim: size of one attention head; `hidden_size / num_attention_heads` unless said.
        sliding_window: how many positions back a token looks, itself included; `None` looks at all.
        layer_types: per layer "full_attention" or "sliding_attention"; empty where the family has one kind.
        norm_eps: what every norm adds to a variance.
        rope: the rotary parameters: `rope_type`, `rope_theta` and what the type needs.
        local_rope: the same for layers with a window; equal to `rope` where the family makes no difference.
        rotary_dim: how much of a head is turned by its position.
        dtype: the checkpoint's own type name, such as "bfloat16"; `None` where it does not say.
        decoder_start_token_id: what every answer of an encoder-decoder begins with, unseen; `None` for a decoder alone.
        eos_token_ids: the union of what `config.json` and `generation_config.json` say. For such ids alone the latter
            is read: its sampling parameters are no defaults here, as in TGI.
        said: all of `config.json`, for what one family alone has.

        incomplete: why only the vocabulary, the positions, the types, the first and the last ids could be read;
            `None` where everything was. A family without an architecture here may call its sizes as it likes:
            transformers asks it.
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
    norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: Mapping[str, Any] = field(hash=False)
    local_rope: Mapping[str, Any] = field(hash=False)
    rotary_dim: int
    dtype: str | None
    decoder_start_token_id: int | None
    eos_token_ids: frozenset[int]
    said: Mapping[str, Any] = field(hash=False, repr=False)
    incomplete: str | None = None

    def window(self, layer: int) -> int | None:
        """The attention window of one layer."""
        if self.layer_types and self.layer_types[layer] != "sliding_attention":
            return None
        return self.sliding_window

    @property
    def leaves_float16(self) -> bool:
        """Whether what the model computes does not stay in the range of float16."""
        return self.model_type in TOO_WIDE_FOR_FLOAT16

    @property
    def qkv_heads(self) -> tuple[int, int, int]:
        """How many heads queries, keys and values have."""
        return self.num_attention_heads, self.num_key_value_heads, self.num_key_value_heads

    @property
    def positions_end(self) -> bool:
        """Whether nothing is beyond `max_position_embeddings`; else it says how long texts were in training."""
        return "relative_attention_max_distance" not in self.said

    def number(self, key: str, default: float | None = None) -> float:
        """A number that one family alone has. Raises ModelError where it is not one."""
        value = self.said.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be a number, not {value!r}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer that one family alone has. Raises ModelError where it is not one."""
        return _count(self.said, key, default)

    def optional_number(self, key: str) -> float | None:
        """The same, for one that may be missing."""
        return None if self.said.get(key) is None else self.number(key)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read a checkpoint directory's configuration.

        Raises:
            ModelError: a file is missing or broken, or a key has no sensible value; the text names it.
        """
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a directory; give --model-id a directory that holds a model")
        said = _renamed(_read_json(directory / "config.json", "; is this the directory of a Hugging Face model?"))
        generation_file = directory / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        model_type = str(said.get("model_type", ""))
        if not model_type:
            raise ModelError(f"{directory.name}/config.json has no model_type")
        known = {**_under_one_name(DEFAULTS.get(model_type, {})), **_under_one_name(said)}
        eos_token_ids = _eos_ids(said, "config.json") | _eos_ids(generation, generation_file.name)
        try:
            return cls._of(known, model_type, _decoder_start(known, generation), eos_token_ids)
        except ModelError as error:
            if model_type in DEFAULTS:
                raise
            return cls._of_another(known, generation, model_type, eos_token_ids, str(error))

    @classmethod
    def _of(
        cls, said: Mapping[str, Any], model_type: str, decoder_start: int | None, eos_token_ids: frozenset[int]
    ) -> Self:
        heads, hidden = _count(said, "num_attention_heads"), _count(said, "hidden_size")
        head_dim, rope = _count(said, "head_dim", hidden // heads), _rope(said, "full_attention")
        vocab_size = _count(said, "vocab_size")
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_count(said, "intermediate_size", 4 * hidden),
            num_hidden_layers=_count(said, "num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=_kv_heads(said, heads),
            head_dim=head_dim,
            max_position_embeddings=min(_count(said, "max_position_embeddings", 2048), MOST_POSITIONS),
            norm_eps=_positive(said, "norm_eps", 1e-6),
            hidden_act=_activation(said, model_type),
            tie_word_embeddings=bool(said.get("tie_word_embeddings", False)),
            attention_bias=bool(said.get("attention_bias", False)),
            mlp_bias=bool(said.get("mlp_bias", False)),
            sliding_window=_window(said, model_type),
            layer_types=_layer_types(said, model_type),
            rope=rope,
            local_rope=_rope(said, "sliding_attention"),
            rotary_dim=_rotary_dim(said, rope, head_dim),
            dtype=_dtype(said),
            decoder_start_token_id=decoder_start,
            # Of an id that the model has no row for nothing would ever come.
            eos_token_ids=frozenset(i for i in eos_token_ids if i < vocab_size),
            said=said,
        )

    @classmethod
    def _of_another(
        cls, said: Mapping[str, Any], generation: Mapping[str, Any], model_type: str, eos_token_ids: frozenset[int],
        incomplete: str,
    ) -> Self:  # fmt: skip
        if "text_config" in said:
            raise ModelError(f"model type {model_type!r} is not served: it takes more than text")
        vocab_size = _count(said, "vocab_size")
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            max_position_embeddings=min(_count(said, "max_position_embeddings", 2048), MOST_POSITIONS),
            dtype=_dtype(said),
            eos_token_ids=frozenset(i for i in eos_token_ids if i < vocab_size),
            said=said,
            incomplete=incomplete,
            decoder_start_token_id=_decoder_start(said, generation),
            hidden_size=0, intermediate_size=0, num_hidden_layers=0, num_attention_heads=0, num_key_value_heads=0,
            head_dim=0, norm_eps=0.0, hidden_act="", tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
            sliding_window=None, layer_types=(), rope={}, local_rope={}, rotary_dim=0,
        )  # fmt: skip


def _read_json(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return content


def _renamed(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Files from before transformers had an architecture of its own for them call it otherwise."""
    model_type = said.get("model_type")
    if model_type in ("RefinedWeb", "RefinedWebModel"):
        return {"new_decoder_architecture": model_type == "RefinedWeb", **said, "model_type": "falcon"}
    if model_type == "gpt2" and said.get("attention_head_type") == "multiquery":
        return {**said, "model_type": "gpt_bigcode"}
    return said


def _under_one_name(said: Mapping[str, Any]) -> dict[str, Any]:
    known = dict(said)
    for name, others in NAMES.items():
        for other in others:
            if known.get(name) is None and (value := _at(known, other)) is not None:
                known[name] = value
    return known


def _at(said: Mapping[str, Any], path: str) -> Any:
    first, _, rest = path.partition(".")
    value = said.get(first)
    if not rest:
        return value
    return _at(value, rest) if isinstance(value, dict) else None


def _count(
    said: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1
) -> int:
    value = said.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        kind = "a positive integer" if least else "an integer from 0"
        kind += f" to {most}" if most < 2**31 - 1 else ""
        raise ModelError(f"config.json: {key} must be {kind}, not {reprlib.repr(value)}")
    return value


def _positive(said: Mapping[str, Any], key: str, default: float) -> float:
    value = said.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key} must be a positive number, not {reprlib.repr(value)}")
    return value


def _record(said: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"config.json: {key} must be an object, not {reprlib.repr(value)}")
    return dict(value or {})


def _dtype(said: Mapping[str, Any]) -> str | None:
    value = said.get("dtype") or said.get("torch_dtype")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"config.json: dtype must be a type's name, not {reprlib.repr(value)}")
    return value and value.removeprefix("torch.")


def _eos_ids(said: Mapping[str, Any], file: str) -> frozenset[int]:
    value = said.get("eos_token_id")
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ModelError(f"{file}: eos_token_id must be a token's id or a list of them, not {reprlib.repr(value)}")
    return frozenset(ids)


def _kv_heads(said: Mapping[str, Any], heads: int) -> int:
    # Falcon's later models name a number of them instead, and leave the older switch on.
    if said.get("multi_query", False) and not said.get("new_decoder_architecture", False):
        return 1
    return _count(said, "num_key_value_heads", heads)


def _rotary_dim(said: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> int:
    share = min(1.0, _positive(rope, "partial_rotary_factor", 1.0))
    return _count(said, "rotary_dim", int(head_dim * share))


def _decoder_start(said: Mapping[str, Any], generation: Mapping[str, Any]) -> int | None:
    if not said.get("is_encoder_decoder", False):
        return None
    for key in ("decoder_start_token_id", "bos_token_id"):
        for where in (generation, said):
            token_id = where.get(key)
            if isinstance(token_id, int) and 0 <= token_id < _count(said, "vocab_size"):
                return token_id
    raise ModelError("config.json: an encoder-decoder needs a decoder_start_token_id")


def _window(said: Mapping[str, Any], model_type: str) -> int | None:
    # Qwen names a window and switches it off beside it.
    if model_type.startswith("qwen") and not said.get("use_sliding_window", False):
        return None
    return None if said.get("sliding_window") is None else _count(said, "sliding_window")


def _layer_types(said: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    layers = _count(said, "num_hidden_layers", most=MOST_LAYERS)
    types = said.get("layer_types") or ()
    if not isinstance(types, list | tuple) or not all(isinstance(kind, str) for kind in types):
        raise ModelError(f"config.json: layer_types must be a list of names, not {reprlib.repr(types)}")
    types = tuple(types)
    if types and len(types) != layers:
        raise ModelError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    if types:
        return types
    if model_type == "qwen2_moe":
        upper = _count(said, "max_window_layers", 28, least=0)
        return tuple("full_attention" if i % 2 or i >= upper else "sliding_attention" for i in range(layers))
    if model_type in ("qwen2", "qwen3"):
        full = min(_count(said, "max_window_layers", 28, least=0), layers)
        return ("full_attention",) * full + ("sliding_attention",) * (layers - full)
    if said.get("sliding_window_pattern") is not None:
        every = _count(said, "sliding_window_pattern")
        return tuple("sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers))
    return ()


def _activation(said: Mapping[str, Any], model_type: str) -> str:
    name = str(said.get("hidden_act") or "silu")
    # The first Gemmas say "gelu" and were trained with its approximation.
    return "gelu_pytorch_tanh" if model_type == "gemma" and name == "gelu" else name


def _rope(said: Mapping[str, Any], layer_type: str) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`, one or one a layer type; before, `rope_theta` stood beside an optional
    `rope_scaling`, which never meant the layers that have a `rope_local_base_freq` of their own.
    """
    theta, local_theta = _positive(said, "rope_theta", 10000.0), said.get("rope_local_base_freq")
    local = layer_type == "sliding_attention" and local_theta is not None
    rope = _record(said, "rope_parameters") or ({} if local else _record(said, "rope_scaling"))
    if layer_type in rope or "full_attention" in rope:
        rope = _record(rope, layer_type)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if "short_factor" in rope:
        rope["rope_type"] = "longrope"  # which Phi-3 called "su", and even "yarn", at first
    rope.setdefault("rope_theta", local_theta if local else theta)
    rope.setdefault("partial_rotary_factor", said.get("partial_rotary_factor", 1.0))
    # Where a scaled type measures from: said beside the parameters, among them, or not at all.
    rope.setdefault("max_position_embeddings", min(_count(said, "max_position_embeddings", 2048), MOST_POSITIONS))
    if (original := said.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    rope.setdefault("original_max_position_embeddings", rope["max_position_embeddings"])
    return rope
