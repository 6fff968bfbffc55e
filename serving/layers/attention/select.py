"""The attention backends by name; grep finds them here."""

from importlib import import_module
from typing import cast

import torch

from serving.errors import ConfigurationError
from serving.layers.attention.backend import AttentionBackend

BACKENDS = {
    "matmul": "serving.layers.attention.matmul:MatmulAttention",
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
    return "matmul" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
