"""Linear layers, and the choice of the kernel that multiplies.

Knows no checkpoint: it is given the weight that this rank keeps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.parallel import Ranks

# oneDNN's kernels for one, two and three rows take up to 1.6 times as long as its kernel for four.
_FEWEST_ROWS = 4


class Linear(nn.Module):
    """`x @ weight.T + bias` with torch's own kernel: every device, and the slow twin of `PackedLinear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` on a CPU, from a weight that oneDNN reordered once into its blocked layout.

    A decoding step multiplies few rows and is bound by reading the weight; torch's `F.linear` reads it at less
    than half the rate of the blocked layout there. Results agree with `F.linear` to rounding, and for float32 do not
    depend on how many rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # 16 is the hint of rows to lay the weight out for: measured best or equal from 1 row to 256.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        rows = len(x)
        if rows < _FEWEST_ROWS:
            x = F.pad(x, (0, 0, 0, _FEWEST_ROWS - rows))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")[:rows]


class SummedLinear(nn.Module):
    """A layer whose inputs the ranks share out: each computes its part, and the parts are added.

    Args:
        part: [rows, this rank's inputs] -> [rows, out], without the bias, which is added once.
    """

    def __init__(self, part: nn.Module, bias: Tensor | None, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.bias, self.ranks = part, bias, ranks

    def forward(self, x: Tensor) -> Tensor:
        """[rows, this rank's inputs] -> [rows, out], the same on every rank."""
        whole = self.ranks.sum(self.part(x))
        return whole if self.bias is None else whole + self.bias


class SplitHead(nn.Module):
    """A layer whose outputs the ranks share out, brought together on rank 0.

    Args:
        part: [rows, in] -> [rows, this rank's outputs], as many on every rank.
        size: how many outputs there are in all; what ranks have beyond them is cut off.
    """

    def __init__(self, part: nn.Module, size: int, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.size, self.ranks = part, size, ranks

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, size] on rank 0; what others get nobody reads."""
        return self.ranks.gather(self.part(x))[..., : self.size]


class HeadLinear(nn.Module):
    """A product with a matrix of each head's own. weight [heads, in, out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, heads, in] -> [tokens, heads, out]."""
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)


class WideLinear(nn.Module):
    """A linear layer in float32, whatever the type of its input. weight [out, in], in float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = make_linear(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in float32."""
        return self.linear(x.float())


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with the fastest kernel for the weight's device and type. weight [out, in], bias [out]."""
    return PackedLinear(weight, bias) if packs(weight.device.type, weight.dtype) else Linear(weight, bias)


def packs(device_type: str, dtype: torch.dtype) -> bool:
    """Whether weights of this type are laid out anew on such a device."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
