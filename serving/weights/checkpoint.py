"""A checkpoint's tensors by name, as views of its safetensors files.

Knows no model, no rank and no number format: it hands out tensors as they lie on disk.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.errors import ModelError
from serving.weights.weight_files import INDEX, POINTER_START, listed, weight_files

# What safetensors calls the types that it can hold and torch can.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class MissingTensor(ModelError):
    """A model asked for a tensor that the checkpoint does not have.

    Attributes:
        name: the tensor's.
    """

    def __init__(self, names: list[str]) -> None:
        what = f"tensor {names[0]!r}" if len(names) == 1 else f"{len(names)} tensors of the model: {listed(names)}"
        super().__init__(f"the weights lack {what}; do config.json and the weights belong together?")
        self.name = names[0]


class Checkpoint(Protocol):
    """Where a builder takes its tensors from."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor in the checkpoint's type: a view of the file, which is read where it is used.

        Raises ModelError.
        """
        ...


class SafetensorsCheckpoint:
    """A directory with one `.safetensors` file, or several with or without an index.

    A file may say in its metadata that a tensor is to be found under another name: tied weights lie there once.

    Args:
        directory: the checkpoint's directory.

    Attributes:
        on_read: called with the bytes of every tensor when it is first read, for a progress bar.
        total_bytes: of all tensors together.

    Raises:
        ModelError: there are no weights, files contradict each other, or one is corrupt or truncated; the text names
            the file.
    """

    def __init__(self, directory: Path) -> None:
        self.on_read: Callable[[int], object] | None = None
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._same_as: dict[str, str] = {}
        self._read: set[str] = set()
        self.total_bytes = 0
        paths, index = weight_files(directory)
        for path in paths:
            self._files[path], nbytes = _open(path)
            self.total_bytes += nbytes
            self._take_names(path, index)
        if stray := [name for name in index if name not in self._file_of]:
            raise ModelError(f"{index[stray[0]]} does not hold {listed(stray)}, though {INDEX} says so")

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._file_of or name in self._same_as

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted({*self._file_of, *self._same_as})

    def read(self, name: str) -> Tensor:
        """A view of one tensor. Raises ModelError where it is missing or its bytes cannot be read."""
        if name not in self._file_of:
            name = self._same_as.get(name, name)
        path = self._file_of.get(name)
        if path is None:
            raise MissingTensor([name])
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{path.name} cannot be read at {name!r}: {error}") from error
        if name not in self._read and self.on_read is not None:
            self.on_read(tensor.nbytes)
        self._read.add(name)
        return tensor

    def unread(self) -> list[str]:
        """Names of tensors that no layer asked for, sorted."""
        return sorted(self._file_of.keys() - self._read)

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of all tensors, from the files' headers."""
        return {name: torch.Size(self._files[path].get_slice(name).get_shape()) for name, path in self._file_of.items()}

    def _take_names(self, path: Path, index: Mapping[str, str]) -> None:
        for name in self._files[path].keys():  # noqa: SIM118 - not a dict
            if index.get(name, path.name) != path.name:
                continue  # the index points to another file's
            if name in self._file_of:
                raise ModelError(f"{self._file_of[name].name} and {path.name} both hold {name!r}; remove one of them")
            self._file_of[name] = path
        said = self._files[path].metadata() or {}
        self._same_as.update({name: kept for name, kept in said.items() if self._file_of.get(kept) == path})


class Survey:
    """Finds out which tensors of a model are missing, without reading any: those it hands out have shapes alone.

    A missing tensor gets the shape that its like in another layer has; where there is none the survey ends.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._shapes = checkpoint.shapes()
        self._alike = {layerless(name): shape for name, shape in self._shapes.items()}
        self.missing: list[str] = []

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return self._checkpoint.has(name)

    def names(self) -> list[str]:
        """Of all tensors that are there, sorted."""
        return self._checkpoint.names()

    def read(self, name: str) -> Tensor:
        """A tensor without numbers. Raises ModelError where nobody knows its shape."""
        if not self.has(name):
            self.missing.append(name)
        shape = self._shapes.get(name, self._alike.get(layerless(name)))
        if shape is None:
            raise MissingTensor([name])
        return torch.empty(shape, device="meta")


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

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._shapes)

    def read(self, name: str) -> Tensor:
        """A random tensor, already on the device."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        draw = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, device=self._device, dtype=self._dtype).normal_(std=0.02, generator=draw)


def layerless(name: str) -> str:
    """A tensor's name with a star for every number: the same for its like in all layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _open(path: Path) -> tuple[Any, int]:
    """The file and the bytes of its tensors, which the package checked to lie gapless behind a header that fits."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start == POINTER_START:
            raise ModelError(f"{path.name} is only a Git LFS pointer to the real file; `git lfs pull` fetches it")
        return safe_open(path, framework="pt", device="cpu"), path.stat().st_size - 8 - int.from_bytes(start, "little")
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{path.name} is corrupt or truncated: {error}") from error
