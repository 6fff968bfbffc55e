"""A checkpoint on the hub of which only the headers were read: names, types and shapes, a few kilobytes a file.

Knows no model and no device.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from torch import Tensor

from serving import __version__
from serving.errors import ConfigurationError, ModelError, WeirError
from serving.weights.checkpoint import DTYPES, MissingTensor
from serving.weights.hub import LIBRARY, check_revision, reason
from serving.weights.model_files import CONFIG

MOST_NUMBERS = 2**48  # in a tensor; torch counts its bytes in 63 bits


class HeaderCheckpoint:
    """`Checkpoint` whose tensors have no data.

    Args:
        shapes: by name, each tensor's type as safetensors writes it and its shape.
        where: the model's name for an error.

    Raises:
        ModelError: a shape is none, or larger than any tensor.
    """

    def __init__(self, shapes: Mapping[str, tuple[str, list[int]]], where: str) -> None:
        for name, (_, shape) in shapes.items():
            if not _is_shape(shape):
                raise ModelError(f"{where} has a broken header: {name!r} has the shape {str(shape)[:100]!r}")
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


def read_headers(model_id: str, revision: str | None, token: str | None) -> tuple[Path, HeaderCheckpoint]:
    """What the hub tells of a model: a directory with its config.json, and its weights' headers.

    Args:
        revision: a branch, a tag or a commit; the main branch where it is None.
        token: for what not everybody may read; a stored one where it is None.

    Raises:
        ConfigurationError: it cannot be had, or (ModelError) is broken; the text says what to do in one line.
    """
    revision = revision or constants.DEFAULT_REVISION
    check_revision(revision)
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    try:
        info = api.model_info(model_id, revision=revision)
        if CONFIG not in {file.rfilename for file in info.siblings or ()}:
            raise ModelError(f"{model_id} holds no {CONFIG}: it is not a model that transformers could load.")
        config = api.hf_hub_download(model_id, CONFIG, revision=info.sha)
        shapes = _shapes(api, model_id, info.sha)
    except WeirError:
        raise
    except Exception as error:  # what the client's transport raises has another name in each of its versions
        raise ConfigurationError(reason(error, model_id, revision, token)) from error
    return Path(config).parent, HeaderCheckpoint(shapes, model_id)


def _shapes(api: HfApi, model_id: str, sha: str | None) -> dict[str, tuple[str, list[int]]]:
    """What `HeaderCheckpoint` takes, yet unchecked."""
    try:
        files = api.get_safetensors_metadata(model_id, revision=sha).files_metadata
        tensors = [named for file in files.values() for named in file.tensors.items()]
    except NotASafetensorsRepoError as error:
        raise ModelError(f"{model_id} holds no safetensors weights") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorsParsingError) as error:
        raise ModelError(f"{model_id} has a broken header or index of its weights ({type(error).__name__})") from error
    return {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors}


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= MOST_NUMBERS for size in shape):
        return False
    return math.prod(shape) <= MOST_NUMBERS
