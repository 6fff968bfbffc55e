"""The attention of transformers' own classes as a function of ours, and the head of such a class by itself.

Knows no checkpoint, no cache and no class of them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from serving.errors import ModelError
from serving.models.select import FOREIGN_FAILURES

RECORDED_TOKENS = 3
_FAR = 1 << 17
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
        everything: whether it sees all there is, before and behind it.
    """

    causal: bool
    window: int | None = None
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a layer's attention turned out to be; the names are those of `LayerBuilder.attention`."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


class Recorder:
    """An `Attend` that computes nothing and notes what it is asked for.

    Args:
        ahead: whether tokens see what comes after them.
        text: how many tokens another text has that the class is given to look at; other than its own has.

    Attributes:
        layers: those that attend to the tokens themselves, in the order of their calls.
        crosses: likewise those that attend to the other text.
    """

    def __init__(self, *, ahead: bool = False, text: int | None = None) -> None:
        self.layers: dict[nn.Module, Recorded] = {}
        self.crosses: dict[nn.Module, Recorded] = {}
        self._ahead, self._text = ahead, text

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, said: Mapping[str, Any]
    ) -> Tensor:
        if module in self.layers or module in self.crosses:
            raise ModelError("a layer attends twice")
        if unknown := [name for name, what in said.items() if what is not None and name not in _WITHOUT_EFFECT]:
            raise ModelError(f"its attention also asks for {unknown[0]!r}")
        if mask is not None and not isinstance(mask, Visible):
            raise ModelError("it makes attention masks of its own")
        crosses = key.shape[2] == self._text
        if crosses or self._ahead:
            _check_sees_all(mask, said)
        else:
            _check_looks_back(module, mask, said)
        if len(query) != 1 or not (crosses or key.shape[2] == query.shape[2]):
            raise ModelError("its attention looks elsewhere than at the tokens themselves")
        if value.shape[-1] > query.shape[-1]:
            raise ModelError("its values are wider than its keys")
        scale = said.get("scaling")
        (self.crosses if crosses else self.layers)[module] = Recorded(
            heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[-1],
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            # A mask says it all; without one, the class relies on what it says besides.
            window=said.get("sliding_window") if mask is None else mask.window, softcap=said.get("softcap"),
        )  # fmt: skip
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


class Seam:
    """The attention function of one model, as transformers knows it: what it does is what the forward under way says.

    It is kept here and not handed through the forward: some classes hand nothing on to their layers.

    Attributes:
        positions: where the tokens of the forward under way stand: [tokens]; `None` where the class counts them itself.
    """

    def __init__(self) -> None:
        self._attend: Attend | None = None
        self.positions: Tensor | None = None
        self.serving, self.recording = f"weir_{id(self)}", f"weir_recording_{id(self)}"
        AttentionInterface.register(self.serving, self)
        AttentionInterface.register(self.recording, self)
        # Masks are made for names alone that are known here too: a serving step needs none.
        AttentionMaskInterface.register(self.recording, _visible)

    @contextmanager
    def attending(self, attend: Attend, positions: Tensor | None = None) -> Iterator[None]:
        """Let this compute attention meanwhile, for tokens that stand at these positions."""
        self._attend, self.positions = attend, positions
        try:
            yield
        finally:
            self._attend = self.positions = None

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


def record(model: PreTrainedModel, seam: Seam, recorder: Recorder, run: Callable[[], Tensor]) -> Tensor:
    """What this computes without any attention, whose layers the recorder notes.

    Raises ModelError where the class does anything that our attention does not.
    """
    model.set_attn_implementation(seam.recording)
    try:
        with torch.inference_mode(), seam.attending(recorder):
            computed = run()
    except FOREIGN_FAILURES as error:
        raise refused(model.config.model_type, f"its code fails: {line_of(error)}") from error
    except ModelError as error:
        raise refused(model.config.model_type, str(error)) from error
    if not recorder.layers:
        raise refused(model.config.model_type, "its layers take no attention function")
    return computed


def own_logits(model: PreTrainedModel, seam: Seam, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits that the class computes all by itself, without a cache: [tokens, vocabulary]."""
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(seam.serving)
    return logits


def as_rows(part: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[1, heads, tokens, ...] -> [tokens, heads, size]."""
    # Where values are narrower than keys, as many numbers are kept of both.
    padded = F.pad(part[0].transpose(0, 1), (0, size - part.shape[-1]))
    # Through two dimensions, since a single head may have any stride and still count as contiguous.
    return padded.to(dtype).reshape(len(padded), -1).unflatten(1, (-1, size))


def as_attended(rows: Tensor, query: Tensor, value_size: int) -> Tensor:
    """What our attention computed for a query, [tokens, ...], as an `Attend` gives it back."""
    return rows.view(1, -1, query.shape[1], query.shape[-1])[..., :value_size].to(query.dtype)


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The way from hidden states to logits, with all that the class does there: the same model without its layers."""
    if model.base_model is model:
        raise refused(model.config.model_type, "its head cannot be told from its layers")
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Given()}
    return head


def _check_looks_back(module: nn.Module, mask: Visible | None, said: Mapping[str, Any]) -> None:
    if mask is not None and not mask.causal:
        raise ModelError("its attention mask is neither causal nor a window")
    causal = said.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ModelError("its attention looks ahead")


def _check_sees_all(mask: Visible | None, said: Mapping[str, Any]) -> None:
    if mask is not None and not mask.everything:
        raise ModelError("its attention hides a part of the text that is read")
    for name in ("sliding_window", "softcap"):
        if mask is None and said.get(name) is not None:
            raise ModelError(f"its attention to the text that is read asks for {name!r}")


def _visible(mask_function: Callable[..., Tensor], config: PreTrainedConfig, **_: Any) -> Visible:
    """The mask that transformers knows: not a tensor but what the class's rule amounts to.

    A forward of a few tokens does not show a window of thousands, so the rule is asked for tokens far behind.
    """
    last = int(getattr(config, "max_position_embeddings", None) or _FAR)
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
    keys = torch.arange(last + 1).view(1, 1, 1, -1)
    counts, everything = {}, True
    for position in {last - 1, last - 2, last // 2, last // 3, 0}:
        seen = (
            mask_function(zero, zero, zero + position, keys).expand(keys.shape).flatten().nonzero().flatten().tolist()
        )
        everything = everything and len(seen) == last + 1
        if everything:
            continue
        if seen != list(range(position + 1 - len(seen), position + 1)):
            return Visible(causal=False)
        counts[position] = len(seen)
    if everything:
        return Visible(causal=False, everything=True)
    window = max(counts.values())
    if any(count != min(position + 1, window) for position, count in counts.items()):
        return Visible(causal=False)
    return Visible(causal=True, window=None if window == last else window)


def refused(model_type: str, why: str) -> ModelError:
    return ModelError(f"unsupported model type {model_type!r}, which transformers' own code cannot serve either: {why}")


def line_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
