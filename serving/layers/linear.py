"""Linear layers, and the choice of the kernel that multiplies.

Knows no checkpoint and no rank: it is given the weight that this device keeps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with the fastest kernel for the weight's device and type. weight [out, in], bias [out]."""
    if weight.device.type == "cpu" and _can_pack(weight.dtype):
        return PackedLinear(weight, bias)
    return Linear(weight, bias)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
