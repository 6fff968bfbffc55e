"""A checkpoint on the hub of which only the headers were read: names, types and shapes, a few kilobytes a file.

Knows no model and no device.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, OfflineModeIsEnabled
from torch import Tensor

from serving.errors import ModelError
from serving.weights.checkpoint import DTYPES, MissingTensor


class HeaderCheckpoint:
    """`Checkpoint` whose tensors have no data.

    Args:
        shapes: by name, each tensor's type as safetensors writes it and its shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[str, list[int]]]) -> None:
        self._shapes = shapes

    def has(self, name: str) -> bool:
        """See `Checkpoint`."""
        return name in self._shapes

    def names(self) -> list[str]:
        """See `Checkpoint`."""
        return sorted(self._shapes)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`. The tensor is on the device without memory. Raises ModelError."""
        if name not in self._shapes:
            raise MissingTensor([name])
        dtype, shape = self._shapes[name]
        if dtype not in DTYPES:
            raise ModelError(f"the type {dtype} of {name!r} is not known")
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def read_headers(model_id: str, revision: str | None) -> tuple[Path, HeaderCheckpoint]:
    """What the hub tells of a model: a directory with its config.json, and its weights' headers.

    Raises:
        ModelError: there is no such model, or it cannot be reached.
    """
    try:
        config = hf_hub_download(model_id, "config.json", revision=revision)
        files = HfApi().get_safetensors_metadata(model_id, revision=revision).files_metadata
    except NotASafetensorsRepoError as error:
        raise ModelError(f"{model_id} holds no safetensors weights") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelError(f"{model_id} is no directory here, and the hub did not tell: {error}") from error
    shapes = {
        name: (str(tensor.dtype), list(tensor.shape))
        for file in files.values()
        for name, tensor in file.tensors.items()
    }
    return Path(config).parent, HeaderCheckpoint(shapes)
