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

    Every angle is a function of its token's position alone, whatever else the sequence or the batch holds: what a
    cache keeps is then right for whoever takes it over.

    Args:
        size: how many numbers of a head are turned.
        rope: `rope_type`, `rope_theta` and what the type needs, under transformers' names.

    Raises:
        ModelError: the checkpoint asks for a type that is not served, or leaves out what its type needs.
    """

    def __init__(self, size: int, rope: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        make = _TYPES.get(str(rope["rope_type"]))
        if make is None:
            raise ModelError(
                f"config.json: rope_type {rope['rope_type']!r} is not served; known are {', '.join(_TYPES)}"
            )
        try:
            self.frequencies, self.scale = make(size, rope, device)
        except KeyError as error:
            raise ModelError(f"config.json: rope_type {rope['rope_type']!r} needs {error.args[0]}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ModelError(f"config.json: the numbers of rope_type {rope['rope_type']!r} fail: {error}") from error

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """positions [tokens] -> cosines and sines, each [tokens, 1, size]; the first half of the sines negated."""
        position = positions.float().unsqueeze(-1)
        angles = (position * self.frequencies(position)).unsqueeze(1)
        cos, sin = (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn every head's vector by its position: [tokens, heads, head_dim] -> the same."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_pairs(x: Tensor, angles: Angles) -> Tensor:
    """The same where numbers that turn together are neighbours, not half a head apart."""
    cos, sin = (part.chunk(2, -1)[1].float() for part in angles)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def make_rotation(device: torch.device, dtype: torch.dtype) -> Rotation:
    """`rotate`, or the kernel that is faster here."""
    kernels = load(device, dtype)
    return rotate if kernels is None else lambda x, angles: kernels.rotate(x, *angles)


def make_partial_rotation(device: torch.device, dtype: torch.dtype, size: int) -> Rotation:
    """The same for the first `size` numbers of every head; the rest stays."""
    kernels = load(device, dtype)
    if kernels is not None:
        return lambda x, angles: kernels.rotate(x, *angles)
    return lambda x, angles: torch.cat((rotate(x[..., :size], angles), x[..., size:]), -1)


def make_pair_rotation(device: torch.device, dtype: torch.dtype) -> Rotation:
    """`rotate_pairs`, or the kernel that is faster here."""
    kernels = load(device, dtype)
    return rotate_pairs if kernels is None else lambda x, angles: kernels.rotate(x, *angles, pairs=True)


def make_partial_pair_rotation(device: torch.device, dtype: torch.dtype, size: int) -> Rotation:
    """The same for the first `size` numbers of every head; the rest stays."""
    kernels = load(device, dtype)
    if kernels is not None:
        return lambda x, angles: kernels.rotate(x, *angles, pairs=True)
    return lambda x, angles: torch.cat((rotate_pairs(x[..., :size], angles), x[..., size:]), -1)


# Positions [tokens, 1] -> radians a position: [size / 2] or [tokens, size / 2].
_Frequencies = Callable[[Tensor], Tensor]
_Made = tuple[_Frequencies, float]


def _steady(frequencies: Tensor, scale: float = 1.0) -> _Made:
    return lambda _: frequencies, scale


def _powers(size: int, rope: Mapping[str, Any], device: torch.device) -> Tensor:
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return float(rope["rope_theta"]) ** exponents


def _default(size: int, rope: Mapping[str, Any], device: torch.device) -> _Made:
    return _steady(1.0 / _powers(size, rope, device))


def _linear(size: int, rope: Mapping[str, Any], device: torch.device) -> _Made:
    factor = float(rope["factor"])
    if not factor > 0:
        raise ValueError(f"factor {factor}")
    return _steady(1.0 / _powers(size, rope, device) / factor)


def _llama3(size: int, rope: Mapping[str, Any], device: torch.device) -> _Made:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between blended."""
    frequencies = 1.0 / _powers(size, rope, device)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return _steady(frequencies * (kept + (1 - kept) / factor))


def _dynamic(size: int, rope: Mapping[str, Any], device: torch.device) -> _Made:
    """A base that grows with the sequence once it is longer than the model was trained for (NTK-aware scaling): each
    token is turned as if it were its sequence's last, which it is when it is decoded.
    """
    factor, trained = float(rope["factor"]), float(rope["max_position_embeddings"])
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size

    def frequencies(position: Tensor) -> Tensor:
        length = (position + 1).clamp(min=trained)
        growth = (factor * length / trained - (factor - 1)) ** (size / (size - 2))
        return 1.0 / (float(rope["rope_theta"]) * growth) ** exponents

    return frequencies, 1.0


def _yarn(size: int, rope: Mapping[str, Any], device: torch.device) -> _Made:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow waves are slowed further, fast ones kept, scores sharpened."""
    trained = float(rope["original_max_position_embeddings"])
    factor = float(rope["factor"] or rope["max_position_embeddings"] / trained)

    def index(turns: float) -> float:
        """Which frequency makes this many turns within the length that the model was trained for."""
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(float(rope["rope_theta"])))

    first, last = index(float(rope.get("beta_fast") or 32)), index(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = torch.arange(size // 2, dtype=torch.float32, device=device) - first
    slowed = (ramp / max(last - first, 0.001)).clamp(0.0, 1.0)
    frequencies = 1.0 / _powers(size, rope, device)
    return _steady(frequencies * (1 - slowed + slowed / factor), _yarn_scale(factor, rope))


def sharpening(factor: float, by: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by where positions are stretched `factor` times: section 3.4 of its paper,
    with a weight `by` that DeepSeek gave it.
    """
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn_scale(factor: float, rope: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return sharpening(factor, float(rope["mscale"])) / sharpening(factor, float(rope["mscale_all_dim"]))
    return sharpening(factor)


def _longrope(size: int, rope: Mapping[str, Any], device: torch.device) -> _Made:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor for each frequency, another set of them for positions
    beyond the length that the model was trained for.
    """
    trained, longest = float(rope["original_max_position_embeddings"]), float(rope["max_position_embeddings"])
    powers = _powers(size, rope, device)
    for key in ("short_factor", "long_factor"):
        if not isinstance(rope[key], list) or len(rope[key]) != len(powers):
            raise ModelError(f"config.json: {key} must be a list of {len(powers)} numbers")
    short, long = (
        1.0 / (powers * torch.tensor(rope[key], dtype=torch.float32, device=device))
        for key in ("short_factor", "long_factor")
    )
    factor = float(rope.get("factor") or longest / trained)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    if rope.get("attention_factor") is not None:
        scale = float(rope["attention_factor"])
    return lambda position: torch.where(position < trained, short, long), scale


_TYPES: Mapping[str, Callable[[int, Mapping[str, Any], torch.device], _Made]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
