"""A LoRA adapter's tensors, by the names of the base's tensors that they change.

Knows no model and no device: what the base holds is told by its tensors' names.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.errors import ModelError
from serving.weights.adapter_config import ADVICE, AdapterConfig
from serving.weights.model_files import ADAPTER_WEIGHTS

PREFIX = "base_model.model."
# An adapter's own name stands in the tensor's where it was saved without peft's help.
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


@dataclass(frozen=True, slots=True)
class Lora:
    """What is added to a linear layer's weight [out, in]: `scale * b @ a`.

    Attributes:
        a: [rank, in].
        b: [out, rank].
    """

    a: Tensor
    b: Tensor
    scale: float


class AdapterFile:
    """An adapter's directory, opened; tensors are read when they are asked for.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        has: whether the base has a tensor of this name.

    Attributes:
        fan_in_fan_out: whether the base keeps its matrices as [in, out].
        whole: of the base's tensor the adapter's name, for what takes the place of the base's.

    Raises:
        ModelError: the adapter is broken, of a kind that is not served, or belongs to another model.
    """

    def __init__(self, directory: Path, has: Callable[[str], bool]) -> None:
        self._config = AdapterConfig.load(directory)
        self._has = has
        self._file = _open(directory / ADAPTER_WEIGHTS)
        self._pairs: dict[str, dict[str, str]] = {}  # of the base's tensor: "A" and "B", the adapter's names for them
        self._modules: dict[str, str] = {}  # of the base's tensor: the module's name, as patterns know it
        self._unused: set[str] = set()
        self.whole: dict[str, str] = {}
        self.fan_in_fan_out = self._config.fan_in_fan_out
        for key in sorted(self._file.keys()):
            self._sort_in(key)
        for name, pair in self._pairs.items():
            if len(pair) == 1:
                raise ModelError(f"the adapter holds {next(iter(pair.values()))} without its other half ({name})")

    @property
    def adapted(self) -> Sequence[str]:
        """The base's tensors to which something is added, sorted."""
        return sorted(self._pairs)

    def lora(self, name: str, shape: Sequence[int]) -> Lora | None:
        """What is added to the base's tensor of this name; None for one that is not `adapted`.

        Args:
            shape: of the layer's weight: [out, in].

        Raises:
            ModelError: it does not fit the shape, or cannot be read.
        """
        pair = self._pairs.get(name)
        if pair is None:
            return None
        a, b = self.tensor(pair["A"]), self.tensor(pair["B"])
        if not (a.is_floating_point() and b.is_floating_point()):
            raise ModelError(f"the adapter's matrices for {name} are {a.dtype} and {b.dtype}, not floating point")
        fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
        if not fits or (b.shape[0], a.shape[1]) != tuple(shape):
            raise ModelError(
                f"the adapter's matrices for {name}, {list(b.shape)} and {list(a.shape)}, do not fit the base's "
                f"{list(shape)}; do they belong together?"
            )
        return Lora(a, b, self._config.scale(self._modules[name], a.shape[0]))

    def tensor(self, key: str) -> Tensor:
        """A tensor by the adapter's own name. Raises ModelError where it cannot be read."""
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{ADAPTER_WEIGHTS} cannot be read at {key!r}: {_reason(error)}") from error
        self._unused.discard(key)
        return tensor

    def check_all_used(self) -> None:
        """Raise ModelError where some of the tensors were never asked for."""
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
            raise ModelError(f"the adapter's {key} is of a kind that is not served: {ADVICE}")
        else:
            self.whole[self._counterpart(key, name)] = key
        self._unused.add(key)

    def _counterpart(self, key: str, name: str) -> str:
        """The base's tensor that a name means; some checkpoints leave out what the whole model calls its trunk."""
        for candidate in (name, name.partition(".")[2]):
            if candidate and self._has(candidate):
                return candidate
        raise ModelError(
            f"the adapter changes {name} ({key}), which the base model's weights do not hold; do they belong together?"
        )


def _open(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - safetensors ships no types
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path.name} is missing, corrupt or truncated: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Without a path: it may reach whoever asked for the adapter."""
    return (error.strerror or "it is not there") if isinstance(error, OSError) else str(error)
