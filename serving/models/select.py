"""The architectures by the `model_type` of config.json; grep finds them here."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from serving.errors import ModelError
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.weights.model_config import ModelConfig

ARCHITECTURES = {
    "bloom": "serving.models.bloom:bloom",
    "cohere": "serving.models.cohere:cohere",
    "dbrx": "serving.models.dbrx:dbrx",
    "deepseek_v2": "serving.models.deepseek:deepseek_v2",
    "deepseek_v3": "serving.models.deepseek:deepseek_v3",
    "falcon": "serving.models.falcon:falcon",
    "gemma": "serving.models.gemma:gemma",
    "gemma2": "serving.models.gemma2:gemma2",
    "gemma3_text": "serving.models.gemma3:Gemma3",
    "gpt2": "serving.models.gpt2:gpt2",
    "gpt_bigcode": "serving.models.gpt_bigcode:gpt_bigcode",
    "gpt_neox": "serving.models.gpt_neox:gpt_neox",
    "gptj": "serving.models.gptj:gptj",
    "granite": "serving.models.granite:granite",
    "llama": "serving.models.llama:llama",
    "mistral": "serving.models.mistral:mistral",
    "mixtral": "serving.models.mixtral:mixtral",
    "mpt": "serving.models.mpt:mpt",
    "mt5": "serving.models.t5:T5",
    "olmo2": "serving.models.olmo2:olmo2",
    "opt": "serving.models.opt:opt",
    "phi": "serving.models.phi:phi",
    "phi3": "serving.models.phi3:phi3",
    "qwen2": "serving.models.qwen2:qwen2",
    "qwen2_moe": "serving.models.qwen2_moe:qwen2_moe",
    "qwen3": "serving.models.qwen3:qwen3",
    "qwen3_moe": "serving.models.qwen3_moe:qwen3_moe",
    "starcoder2": "serving.models.starcoder2:starcoder2",
    "t5": "serving.models.t5:T5",
    "umt5": "serving.models.t5:T5",
}
FALLBACK = "serving.models.transformers_fallback:TransformersFallback"


# How code that is not ours may fail: in any way.
FOREIGN_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class CausalModel(Protocol):
    """What a runner asks of a model; implementations are nn.Modules."""

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        ...


class EncoderDecoder(CausalModel, Protocol):
    """What a runner asks besides of a model that reads one text and writes another.

    Its decoder's layers are the builder's `attention` and `cross_attention`, its encoder's `encoder_attention`; a
    decoder's forward has the batch's `cross`.
    """

    def encode(self, batch: ForwardBatch) -> Iterable[tuple[Tensor, Tensor]]:
        """What the decoder sees of texts: keys and values of one cross-attention layer after the other.

        Args:
            batch: whole texts, a group each; its keys and values are the encoder's own and only last for the call.

        Returns:
            Two of [tokens, kv_heads, head_dim] a layer.
        """
        ...


class Architecture(Protocol):
    """Makes a model from a configuration and a builder."""

    def __call__(self, config: ModelConfig, build: LayerBuilder) -> CausalModel:
        """Raises ModelError where the checkpoint does not fit."""
        ...


def select(config: ModelConfig, directory: Path, *, trust_remote_code: bool = False) -> Architecture:
    """The architecture for this configuration, imported now; where there is none, transformers' own on our attention.

    Args:
        directory: the checkpoint's; only the fallback looks there.
        trust_remote_code: whether the fallback may run code that lies there.

    Raises:
        ModelError: the model cannot be served; the text says why.
    """
    if config.model_type in ARCHITECTURES:
        return select_own(config)
    return cast(Architecture, _imported(FALLBACK)(directory, trust_remote_code))


def select_own(config: ModelConfig) -> Architecture:
    """The same, without a fallback. Raises ModelError also for a model that would need it."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"no architecture of our own for model type {config.model_type!r}: transformers may serve it")
    if config.incomplete:
        raise ModelError(config.incomplete)
    return cast(Architecture, _imported(ARCHITECTURES[config.model_type]))


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
