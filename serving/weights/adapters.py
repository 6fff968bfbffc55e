"""A checkpoint with a LoRA adapter merged into it, tensor by tensor as they are read.

Knows no model and no device: names and shapes of the adapter's tensors say what they change.
"""

from pathlib import Path

import torch
from torch import Tensor

from serving.errors import ModelError
from serving.weights.adapter_config import ADVICE
from serving.weights.adapter_file import AdapterFile
from serving.weights.checkpoint import Checkpoint


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
        self._adapter = AdapterFile(directory, base.has)

    def has(self, name: str) -> bool:
        """See `Checkpoint.has`."""
        return self._base.has(name)

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._base.names()

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`."""
        weight = self._base.read(name)
        if (key := self._adapter.whole.get(name)) is not None:
            whole = self._adapter.tensor(key)
            if whole.shape != weight.shape:
                raise ModelError(
                    f"the adapter's {key} has the shape {list(whole.shape)} and the base's {list(weight.shape)}: "
                    f"{ADVICE}"
                )
            weight = whole.to(weight.dtype)
        across = self._adapter.fan_in_fan_out  # the base's matrix lies transposed
        lora = self._adapter.lora(name, weight.shape[::-1] if across else weight.shape)
        if lora is None:
            return weight
        outer, inner = (lora.a.T, lora.b.T) if across else (lora.b, lora.a)
        # A copy even of what is float32 already: the base's tensor is the mapped file, and may be read again.
        merged = weight.to(torch.float32, copy=True).addmm_(outer.float(), inner.float(), alpha=lora.scale)
        return merged.to(weight.dtype)

    def check_all_used(self) -> None:
        """Raise ModelError where a model was built without some of the adapter's tensors."""
        self._adapter.check_all_used()
