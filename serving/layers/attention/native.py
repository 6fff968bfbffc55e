"""Paged attention of single tokens by our own kernel, which reads the blocks where they lie; bfloat16 on a CPU.

Held to `sdpa` and `eager`; chunks stay with `matmul`, whose products are large enough for torch. Knows no rank and no
number format.
"""

import torch
from torch import Tensor, nn

from serving.errors import ConfigurationError
from serving.layers import cpu_kernels
from serving.layers.attention.backend import AttentionSpec
from serving.layers.attention.matmul import MatmulAttention
from serving.layers.attention.position_bias import LinearBias
from serving.layers.forward_batch import ForwardBatch


class NativeAttention(nn.Module):
    """One layer's attention. Raises ConfigurationError where the kernels are not compiled."""

    padded_tokens = False

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        kernels = cpu_kernels.load(torch.device("cpu"), torch.bfloat16)
        if kernels is None:
            raise ConfigurationError("attention backend 'native': the CPU kernels were not compiled; install gcc first")
        self.spec, self.kernels, self.chunks = spec, kernels, MatmulAttention(spec)
        self.slopes = spec.bias.slopes if isinstance(spec.bias, LinearBias) else None

    @staticmethod
    def supports(spec: AttentionSpec) -> bool:
        """See `AttentionBackend`."""
        return spec.causal and (spec.bias is None or isinstance(spec.bias, LinearBias))

    def forward(self, query: Tensor, key: Tensor, value: Tensor | None, batch: ForwardBatch) -> Tensor:
        """See `Attention`."""
        spec, keys, values = self.spec, batch.keys[self.spec.layer], batch.values[self.spec.layer]
        self.kernels.store(keys, key, batch.slots)
        if value is not None:
            self.kernels.store(values, value, batch.slots)
        kept = values if spec.value_dim is None else keys[..., : spec.value_dim]
        outputs = []
        for group in batch.groups:
            span = slice(group.start, group.start + group.rows * group.query_length)
            if group.query_length > 1:
                outputs.append(self.chunks.attend(query[span], keys, values, group))
                continue
            attended = self.kernels.attend(
                query[span], keys, kept, group.blocks, batch.positions[span], spec.scale, spec.window or 0,
                spec.softcap or 0.0, self.slopes,
            )  # fmt: skip
            outputs.append(attended)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
