"""Activation functions by the name that config.json gives them."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from serving.errors import ModelError

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of this name. Raises ModelError for one that no served model uses."""
    if name not in _ACTIVATIONS:
        raise ModelError(f"config.json: hidden_act {name!r} is not known; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
