"""Normalisation layers, and the choice of the kernel that computes them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.layers.cpu_kernels import CpuKernels, load
from serving.parallel import Ranks


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MirroredRMSNorm(nn.Module):
    """The same as the layer norm of `x` beside `-x`, whose mean is zero and whose variance is the mean square.

    On a CPU torch composes `rms_norm` of many small operations, but has one for `layer_norm`; while few rows decode,
    the number of operations is what counts.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.size, self.eps = len(weight), eps
        self.weight = torch.cat((weight, weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and type."""
        mirrored = torch.cat((x, -x), -1)
        return F.layer_norm(mirrored, self.weight.shape, self.weight, None, self.eps)[..., : self.size]


class NativeRMSNorm(nn.Module):
    """The same by our own kernel; the weight may be in float32."""

    def __init__(self, kernels: CpuKernels, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.kernels, self.weight, self.eps = kernels, weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and type."""
        return self.kernels.rms_norm(x, self.weight, self.eps)


class WideRMSNorm(nn.Module):
    """The same with a weight in float32, which may be finer than the type of `x`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.norm = make_rms_norm(weight, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and type."""
        return self.norm(x.float()).to(x.dtype)


class SplitRMSNorm(nn.Module):
    """The same over a dimension that the ranks share out, some of them perhaps the same part.

    Args:
        weight: this rank's part.
    """

    def __init__(self, weight: Tensor, eps: float, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.eps, self.ranks = weight, eps, ranks
        # A part that several ranks have is counted as often.
        self.counted = len(weight) * ranks.size

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's part] -> the same shape and type."""
        wide = x.float()
        mean = self.ranks.sum(wide.square().sum(-1, keepdim=True)) / self.counted
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and type."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class HeadLayerNorm(nn.Module):
    """Layer normalisation of every head, each with a weight of its own [heads, head_dim] and no bias."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight.float(), eps

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> the same shape and type."""
        return (F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


def make_rms_norm(weight: Tensor, eps: float) -> nn.Module:
    """The layer that is fastest on the weight's device. weight [size]."""
    if kernels := load(weight.device, weight.dtype):
        return NativeRMSNorm(kernels, weight, eps)
    return MirroredRMSNorm(weight, eps) if weight.device.type == "cpu" else RMSNorm(weight, eps)


def make_wide_rms_norm(weight: Tensor, eps: float, dtype: torch.dtype) -> nn.Module:
    """The same for inputs of a narrower type than the weight, which is in float32."""
    kernels = load(weight.device, dtype)
    return NativeRMSNorm(kernels, weight, eps) if kernels else WideRMSNorm(weight, eps)
