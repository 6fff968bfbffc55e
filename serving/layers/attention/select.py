"""The attention backends by name; grep finds them here."""

from importlib import import_module
from typing import cast

import torch

from serving.errors import ConfigurationError
from serving.layers.attention.backend import Attention, AttentionBackend, AttentionMaker, AttentionSpec
from serving.layers.cpu_kernels import compiled_library

BACKENDS = {
    "eager": "serving.layers.attention.eager:EagerAttention",
    "matmul": "serving.layers.attention.matmul:MatmulAttention",
    "native": "serving.layers.attention.native:NativeAttention",
    "sdpa": "serving.layers.attention.sdpa:SdpaAttention",
}
# What computes a layer that the chosen backend does not support, in this order; the last one supports everything.
SLOWER = ("sdpa", "eager")


def select(name: str) -> AttentionMaker:
    """Makes layers by the backend of this name, or where it cannot do what a layer asks, by the next in `SLOWER`.

    Raises ConfigurationError for an unknown name.
    """
    if name not in BACKENDS:
        raise ConfigurationError(f"unknown attention backend {name!r}; there are: {', '.join(sorted(BACKENDS))}")
    candidates = [backend(other) for other in dict.fromkeys((name, *SLOWER))]

    def make(spec: AttentionSpec) -> Attention:
        for candidate in candidates:
            if candidate.supports(spec):
                return candidate(spec)
        raise ConfigurationError(f"no attention backend can do what the model asks: {spec}")

    return make


def backend(name: str) -> AttentionBackend:
    """The backend of this name, imported now, whatever it supports."""
    module, _, attribute = BACKENDS[name].partition(":")
    return cast(AttentionBackend, getattr(import_module(module), attribute))


def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that is fastest here."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "sdpa"
    return "native" if compiled_library() else "matmul"
