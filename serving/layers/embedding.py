"""Token embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """A row of `weight` [vocabulary, hidden] for every id."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return F.embedding(ids, self.weight)


class ScaledEmbedding(nn.Module):
    """The same, multiplied by a number that is first rounded to the weight's type, as those who trained it did."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.scale = weight, torch.tensor(scale, dtype=weight.dtype).item()

    def forward(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return F.embedding(ids, self.weight) * self.scale
