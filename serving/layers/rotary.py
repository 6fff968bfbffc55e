"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of Llama checkpoints."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from serving.errors import ModelError
from serving.layers.cpu_kernels import load

Angles = tuple[Tensor, Tensor]
Rotation = Callable[[Tensor, Angles], Tensor]


class Rotary(nn.Module):
    """The angles of a model's positions, computed once a step, and their application in every layer.

    Args:
        head_dim: size of one attention head.
        rope: `rope_type` ("default", "linear" or "llama3"), `rope_theta` and what the type needs.

    Raises:
        ModelError: the checkpoint asks for another type.
    """

    def __init__(self, head_dim: int, rope: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequencies = 1.0 / float(rope["rope_theta"]) ** exponents
        self.frequencies = _scaled(frequencies, rope)  # [head_dim / 2], radians a position

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """positions [tokens] -> cosines and sines, each [tokens, 1, head_dim]; the first half of the sines negated."""
        angles = torch.outer(positions.float(), self.frequencies).unsqueeze(1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn every head's vector by its position: [tokens, heads, head_dim] -> the same."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def make_rotation(device: torch.device, dtype: torch.dtype) -> Rotation:
    """`rotate`, or the kernel that is faster here."""
    kernels = load(device, dtype)
    return rotate if kernels is None else lambda x, angles: kernels.rotate(x, *angles)


def _scaled(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    match rope["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / float(rope["factor"])
        case "llama3":
            return _llama3(frequencies, rope)
        case other:
            raise ModelError(f"config.json: rope_type {other!r} is not served; known are default, linear and llama3")


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)
