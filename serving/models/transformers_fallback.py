"""Any other causal language model of transformers whose class takes an attention function, on our paged cache.

Transformers computes all but attention, with its own layers: no rank, no number format and none of our kernels but
attention's. Importing it costs seconds, so this file is imported for a model alone that has no file of ours.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from serving.errors import ModelError
from serving.layers.attention.backend import Attention
from serving.layers.builder import LayerBuilder
from serving.layers.forward_batch import ForwardBatch
from serving.weights.checkpoint import Checkpoint, MissingTensor
from serving.weights.model_config import ModelConfig

_RECORDED_TOKENS = 3
_FAR = 1 << 17
# Code of others may fail in any way.
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
# What a class may hand to its attention and leaves to no function to obey: switches, and what was done before.
_WITHOUT_EFFECT = frozenset({
    "cache_position", "dropout", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "return_dict", "scaling", "sliding_window", "softcap", "use_cache",
})  # fmt: skip


class Attend(Protocol):
    """What computes the attention of a forward."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
    ) -> Tensor:
        """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, ...] -> [1, tokens, heads, ...].

        Args:
            module: whose attention this is.
            mask: what the class's own mask became.
            said: whatever else the class hands to its attention.
        """
        ...


@dataclass(frozen=True, slots=True)
class Visible:
    """What a class's mask lets a token see.

    Attributes:
        causal: whether it sees itself and what is before it, in one stretch.
        window: how many positions, itself included; `None` where it sees all of them.
    """

    causal: bool
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a layer's attention turned out to be; the names are those of `LayerBuilder.attention`."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


class TransformersModel(nn.Module):
    """A class of transformers between our batches and our attention.

    Args:
        model: the class's own model with its weights.
        build: makes the attention layers, in the order in which the class calls them.

    Raises:
        ModelError: something about the class is not served; the text says what.
    """

    def __init__(self, model: PreTrainedModel, build: LayerBuilder) -> None:
        super().__init__()
        self.model, self.dtype, self.seam = model, model.dtype, _Seam()
        self.attends: dict[nn.Module, Attention] = {
            module: build.attention(**asdict(layer)) for module, layer in _recorded(model, self.seam).items()
        }
        self.head = _head(model)
        model.set_attn_implementation(self.seam.serving)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """The last hidden state of every token: [tokens, hidden]."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
        ) -> Tensor:
            size, value_size = query.shape[-1], value.shape[-1]
            # Where values are narrower than keys, as many numbers are kept of both.
            padded = (F.pad(part[0].transpose(0, 1), (0, size - part.shape[-1])) for part in (query, key, value))
            # Through two dimensions, since a single head may have any stride and still count as contiguous.
            flat = (part.to(self.dtype).reshape(len(part), -1).unflatten(1, (-1, size)) for part in padded)
            flat_query, flat_key, flat_value = flat
            attended = self.attends[module](flat_query, flat_key, flat_value, batch)
            return attended.view(1, -1, query.shape[1], size)[..., :value_size].to(query.dtype)

        with self.seam.attending(attend):
            computed = self.model.base_model(
                input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False
            )
        return computed[0][0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary], in float32."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def oracle(self, token_ids: Tensor) -> Tensor:
        """The logits that the class computes all by itself, without a cache: [tokens] -> [tokens, vocabulary]."""
        self.model.set_attn_implementation("eager")
        try:
            return self.model(input_ids=token_ids[None], use_cache=False).logits[0].float()
        finally:
            self.model.set_attn_implementation(self.seam.serving)


class TransformersFallback:
    """An `Architecture` for what lies in a directory. Looks at the configuration alone until it is called.

    Args:
        directory: with `config.json`, and where code comes with the model, with that code.
        trust_remote_code: whether such code may run. Nothing else in the tree runs any.

    Raises:
        ModelError: the model cannot be served so; the text says why.
    """

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        self._trust_remote_code = trust_remote_code
        self._config = self._read(ModelConfig.load(directory), directory)
        if self._config.is_encoder_decoder:
            raise _refused(self._config.model_type, "it has an encoder")
        if self._config.get_text_config() is not self._config:
            raise _refused(self._config.model_type, "it takes more than text")

    def __call__(self, config: ModelConfig, build: LayerBuilder) -> TransformersModel:
        """See `Architecture`."""
        return TransformersModel(build.foreign(self._load), build)

    def _read(self, said: ModelConfig, directory: Path) -> PreTrainedConfig:
        if said.model_type not in CONFIG_MAPPING and not self._trust_remote_code:
            if said.said.get("auto_map"):
                raise ModelError(
                    f"model type {said.model_type!r} comes with code of its own; give --trust-remote-code to run it"
                )
            raise _refused(said.model_type, "it does not know it")
        try:
            return AutoConfig.from_pretrained(directory, trust_remote_code=self._trust_remote_code)
        except _FAILURES as error:
            raise _refused(said.model_type, f"transformers cannot read it: {_line(error)}") from error

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        logging.disable_progress_bar()  # the checkpoint has its own
        logging.set_verbosity_error()  # what is missing or does not fit is said below
        reader = _Reader(checkpoint)
        stored = {name: _Stored(reader, name) for name in checkpoint.names()}
        try:
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(self._config, trust_remote_code=self._trust_remote_code)
            model, found = type(empty).from_pretrained(
                None, config=self._config, state_dict=stored, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        except (*_FAILURES, ModelError) as error:
            # Transformers tells of it in its own words, which name no file.
            raise reader.failure or _refused(
                self._config.model_type, f"transformers cannot load it: {_line(error)}"
            ) from error
        for name, stored_shape, wanted_shape in sorted(found["mismatched_keys"]):
            raise ModelError(f"{name} is {list(stored_shape)}, but config.json makes it {list(wanted_shape)}")
        if missing := sorted(found["missing_keys"]):
            raise ModelError(str(MissingTensor(missing)))  # all are named already
        return model.to(device).requires_grad_(False)


class _Reader:
    """The checkpoint for transformers' threads: one at a time, and the first failure is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._reading = checkpoint, threading.Lock()
        self.failure: ModelError | None = None

    def read(self, name: str) -> Tensor:
        """A tensor's copy: what is read may be a view of the mapped file and change with it."""
        with self._reading:
            try:
                return self._checkpoint.read(name).clone()
            except ModelError as error:
                self.failure = self.failure or error
                raise


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the checkpoint, read when transformers takes it."""

    reader: _Reader
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.read(self.name)[index]


class _Recorder:
    """An `Attend` that computes nothing and notes what it is asked for."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, Recorded] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
    ) -> Tensor:
        if module in self.layers:
            raise ModelError("a layer attends twice")
        if unknown := [name for name, what in said.items() if what is not None and name not in _WITHOUT_EFFECT]:
            raise ModelError(f"its attention also asks for {unknown[0]!r}")
        if mask is not None and not isinstance(mask, Visible):
            raise ModelError("it makes attention masks of its own")
        if mask is not None and not mask.causal:
            raise ModelError("its attention mask is neither causal nor a window")
        causal = said.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise ModelError("its attention looks ahead")
        if key.shape[2] != query.shape[2] or len(query) != 1:
            raise ModelError("its attention looks elsewhere than at the tokens themselves")
        if value.shape[-1] > query.shape[-1]:
            raise ModelError("its values are wider than its keys")
        scale = said.get("scaling")
        self.layers[module] = Recorded(
            heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[-1],
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            # A mask says it all; without one, the class relies on what it says besides.
            window=said.get("sliding_window") if mask is None else mask.window, softcap=said.get("softcap"),
        )  # fmt: skip
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


class _Seam:
    """The attention function of one model, as transformers knows it: what it does is what the forward under way says.

    It is kept here and not handed through the forward: some classes hand nothing on to their layers.
    """

    def __init__(self) -> None:
        self._attend: Attend | None = None
        self.serving, self.recording = f"weir_{id(self)}", f"weir_recording_{id(self)}"
        AttentionInterface.register(self.serving, self)
        AttentionInterface.register(self.recording, self)
        # Masks are made for names alone that are known here too: a serving step needs none.
        AttentionMaskInterface.register(self.recording, _visible)

    @contextmanager
    def attending(self, attend: Attend) -> Iterator[None]:
        """Let this compute attention meanwhile."""
        self._attend = attend
        try:
            yield
        finally:
            self._attend = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **said: Any
    ) -> tuple[Tensor, None]:
        """An attention function in transformers' own terms."""
        if self._attend is None:
            raise ModelError("the model attends outside of its forward")
        return self._attend(module, query, key, value, attention_mask, said), None


class _Hidden(tuple[Tensor]):
    """What the layers below a head say: hidden states. Of whatever else a class may look for there is nothing."""

    @property
    def last_hidden_state(self) -> Tensor:
        """[1, rows, hidden]."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands where a class has the layers below its head, and gives back what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Hidden:
        """[1, rows, hidden] -> the same."""
        return _Hidden((inputs_embeds,))


def _recorded(model: PreTrainedModel, seam: _Seam) -> dict[nn.Module, Recorded]:
    """The layers that attend, in the order of their calls. Raises ModelError."""
    recorder = _Recorder()
    model.set_attn_implementation(seam.recording)
    ids = torch.arange(_RECORDED_TOKENS, device=model.device)[None]
    try:
        with torch.inference_mode(), seam.attending(recorder):
            model.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    except _FAILURES as error:
        raise _refused(model.config.model_type, f"its code fails: {_line(error)}") from error
    except ModelError as error:
        raise _refused(model.config.model_type, str(error)) from error
    if not recorder.layers:
        raise _refused(model.config.model_type, "its layers take no attention function")
    return recorder.layers


def _head(model: PreTrainedModel) -> PreTrainedModel:
    """The way from hidden states to logits, with all that the class does there: the same model without its layers."""
    if model.base_model is model:
        raise _refused(model.config.model_type, "its head cannot be told from its layers")
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    return head


def _visible(mask_function: Callable[..., Tensor], config: PreTrainedConfig, **_: Any) -> Visible:
    """The mask that transformers knows: not a tensor but what the class's rule amounts to.

    A forward of a few tokens does not show a window of thousands, so the rule is asked for tokens far behind.
    """
    last = int(getattr(config, "max_position_embeddings", None) or _FAR)
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
    keys = torch.arange(last + 1).view(1, 1, 1, -1)
    counts = {}
    for position in {last - 1, last - 2, last // 2, last // 3, 0}:
        seen = mask_function(zero, zero, zero + position, keys).flatten().nonzero().flatten().tolist()
        if seen != list(range(position + 1 - len(seen), position + 1)):
            return Visible(causal=False)
        counts[position] = len(seen)
    window = max(counts.values())
    if any(count != min(position + 1, window) for position, count in counts.items()):
        return Visible(causal=False)
    return Visible(causal=True, window=None if window == last else window)


def _refused(model_type: str, why: str) -> ModelError:
    return ModelError(f"unsupported model type {model_type!r}, which transformers' own code cannot serve either: {why}")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
