"""A checkpoint's tensors by name, each read once from its safetensors file.

Knows no model, no rank and no number format: it hands out tensors as they lie on disk.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.errors import ModelError


class Checkpoint(Protocol):
    """Where a builder takes its tensors from."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU and in the checkpoint's type. Raises ModelError."""
        ...


class SafetensorsCheckpoint:
    """A directory with one `.safetensors` file, or several with or without an index.

    Args:
        directory: the checkpoint's directory.
        on_read: called with the bytes of every tensor read, for a progress bar.

    Raises:
        ModelError: there are no weights, or a file is corrupt or truncated; the text names the file.
    """

    def __init__(self, directory: Path, on_read: Callable[[int], object] | None = None) -> None:
        self._on_read = on_read
        self._files = {}
        self._file_of: dict[str, Path] = {}
        self._read: set[str] = set()
        self.total_bytes = 0
        for path in _weight_files(directory):
            self._files[path] = _open(path)
            self.total_bytes += path.stat().st_size
            self._file_of.update(dict.fromkeys(self._files[path].keys(), path))

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """Read one tensor. Raises ModelError where it is missing or its bytes cannot be read."""
        path = self._file_of.get(name)
        if path is None:
            raise ModelError(f"the weights hold no tensor {name!r}; do config.json and the weights belong together?")
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} cannot be read at {name!r}: {error}") from error
        self._read.add(name)
        if self._on_read is not None:
            self._on_read(tensor.nbytes)
        return tensor

    def unread(self) -> list[str]:
        """Names of tensors that no layer asked for, sorted."""
        return sorted(self._file_of.keys() - self._read)


class DummyCheckpoint:
    """Random weights of given shapes, for measuring without a checkpoint on disk.

    Matrices are drawn with a standard deviation of 0.02, vectors are ones, so that activations stay in range. A
    tensor's name seeds its draw: a runner that starts again has the same weights.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = shapes, device, dtype

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._shapes

    def read(self, name: str) -> Tensor:
        """A random tensor, already on the device."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        draw = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, device=self._device, dtype=self._dtype).normal_(std=0.02, generator=draw)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index.name} is not a safetensors index: {error}") from error
        # A name with a path in it could point outside the model's directory.
        if stray := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{index.name} names {stray[0]!r}, which is not a plain file name")
        if missing := [name for name in names if not (directory / name).exists()]:
            raise ModelError(f"{missing[0]} is named in {index.name} and does not exist; is the download complete?")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no .safetensors file; only safetensors weights are served")
    return files


def _open(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - safetensors ships no types
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path.name} is corrupt or truncated: {error}") from error
