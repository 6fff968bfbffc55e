"""Activation functions by the name that config.json gives them."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.errors import ModelError
from serving.layers.cpu_kernels import load


def gelu_tanh(x: Tensor) -> Tensor:
    """The Gaussian error linear unit by a tangent (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


def make_gate(name: str, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The product `activation(gate) * up` of [tokens, 2 * size], gate beside up, by the fastest kernel here.

    Raises ModelError for an activation that no served model uses.
    """
    activate, kernels = activation(name), load(device, dtype)
    if kernels is not None and activate is F.silu:
        return kernels.silu_gate
    if kernels is not None and activate is gelu_tanh:
        return kernels.gelu_gate

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return activate(gate) * up

    return gated


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of this name. Raises ModelError for one that no served model uses."""
    if name not in _ACTIVATIONS:
        raise ModelError(f"config.json: hidden_act {name!r} is not known; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
