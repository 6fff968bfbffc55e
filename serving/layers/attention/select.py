"""The attention backends by name; grep finds them here."""

from importlib import import_module
from typing import cast

import torch

from serving.errors import ConfigurationError
from serving.layers.attention.backend import AttentionBackend
from serving.layers.cpu_kernels import compiled_library

BACKENDS = {
    "matmul": "serving.layers.attention.matmul:MatmulAttention",
    "native": "serving.layers.attention.native:NativeAttention",
    "sdpa": "serving.layers.attention.sdpa:SdpaAttention",
}


def select(name: str) -> AttentionBackend:
    """The backend of this name, imported now. Raises ConfigurationError for an unknown name."""
    if name not in BACKENDS:
        raise ConfigurationError(f"unknown attention backend {name!r}; there are: {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    return cast(AttentionBackend, getattr(import_module(module), attribute))


def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that is fastest here."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "sdpa"
    return "native" if compiled_library() else "matmul"
