"""Token embeddings."""

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
