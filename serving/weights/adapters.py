"""A checkpoint with a LoRA adapter merged into it, tensor by tensor as they are read.

Knows no model and no device: names and shapes of the adapter's tensors say what they change.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.errors import ModelError
from serving.weights.adapter_config import AdapterConfig
from serving.weights.checkpoint import Checkpoint
from serving.weights.model_files import ADAPTER_WEIGHTS

PREFIX = "base_model.model."
# An adapter's own name stands in the tensor's where it was saved without peft's help.
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


class MergedCheckpoint:
    """A base checkpoint whose tensors come out with an adapter merged in: `W + scale * B @ A`, computed in float32.

    What the adapter holds whole (`modules_to_save`, trained biases) takes the place of the base's.

    Args:
        base: the checkpoint that the adapter was trained on.
        directory: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: the adapter is broken, of a kind that cannot be merged, or belongs to another model.
    """

    def __init__(self, base: Checkpoint, directory: Path) -> None:
        self._base = base
        self._config = AdapterConfig.load(directory)
        self._file = _open(directory / ADAPTER_WEIGHTS)
        self._pairs: dict[str, dict[str, str]] = {}  # of the base's tensor: "A" and "B", the adapter's names for them
        self._modules: dict[str, str] = {}  # of the base's tensor: the module's name, as patterns know it
        self._whole: dict[str, str] = {}
        self._unused: set[str] = set()
        for key in sorted(self._file.keys()):
            self._sort_in(key)
        for name, pair in self._pairs.items():
            if len(pair) == 1:
                raise ModelError(f"the adapter holds {next(iter(pair.values()))} without its other half ({name})")

    def has(self, name: str) -> bool:
        """See `Checkpoint.has`."""
        return self._base.has(name)

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._base.names()

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`."""
        weight = self._base.read(name)
        if (key := self._whole.get(name)) is not None:
            whole = self._tensor(key)
            if whole.shape != weight.shape:
                raise ModelError(
                    f"the adapter's {key} has the shape {list(whole.shape)} and the base's {list(weight.shape)}: merge "
                    "it with peft's merge_and_unload and serve the result"
                )
            weight = whole.to(weight.dtype)
        if (pair := self._pairs.get(name)) is not None:
            weight = self._merged(name, weight, self._tensor(pair["A"]), self._tensor(pair["B"]))
        return weight

    def check_all_used(self) -> None:
        """Raise ModelError where a model was built without some of the adapter's tensors."""
        if self._unused:
            raise ModelError(
                f"the adapter's {min(self._unused)} belongs to no layer of the base model; do they belong together?"
            )

    def _sort_in(self, key: str) -> None:
        if not key.startswith(PREFIX):
            raise ModelError(f"the adapter's {key} is not named as peft names tensors ({PREFIX}...)")
        name = _WRAPPERS.sub("", key.removeprefix(PREFIX))
        if (lora := _LORA.fullmatch(name)) is not None:
            module, half = lora.groups()
            target = self._counterpart(key, f"{module}.weight")
            self._pairs.setdefault(target, {})[half] = key
            self._modules[target] = module
        elif "lora_" in name or "trainable_tokens" in name:
            raise ModelError(
                f"the adapter's {key} is of a kind that is not merged while loading: merge it with peft's "
                "merge_and_unload and serve the result"
            )
        else:
            self._whole[self._counterpart(key, name)] = key
        self._unused.add(key)

    def _counterpart(self, key: str, name: str) -> str:
        """The base's tensor that a name means; some checkpoints leave out what the whole model calls its trunk."""
        for candidate in (name, name.partition(".")[2]):
            if candidate and self._base.has(candidate):
                return candidate
        raise ModelError(
            f"the adapter changes {name} ({key}), which the base model's weights do not hold; do they belong together?"
        )

    def _merged(self, name: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        across = self._config.fan_in_fan_out  # the base's matrix lies transposed
        fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
        inner, outer = (b.T, a.T) if across else (a, b)
        if not fits or weight.shape != (outer.shape[0], inner.shape[1]):
            raise ModelError(
                f"the adapter's matrices for {name}, {list(b.shape)} and {list(a.shape)}, do not fit the base's "
                f"{list(weight.shape)}; do they belong together?"
            )
        scale = self._config.scale(self._modules[name], a.shape[0])
        # A copy even of what is float32 already: the base's tensor is the mapped file, and may be read again.
        merged = weight.to(torch.float32, copy=True).addmm_(outer.float(), inner.float(), alpha=scale)
        return merged.to(weight.dtype)

    def _tensor(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{ADAPTER_WEIGHTS} cannot be read at {key!r}: {error}") from error
        self._unused.discard(key)
        return tensor


def _open(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - safetensors ships no types
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path.name} is missing, corrupt or truncated: {error}") from error
