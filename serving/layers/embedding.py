"""Token embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.parallel import Ranks


class Embedding(nn.Module):
    """A row of `weight` [vocabulary, hidden] for every id."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return F.embedding(ids, self.weight)


class SplitEmbedding(nn.Module):
    """The same where every rank has some of the rows, as many as any other: weight [rows, hidden]."""

    def __init__(self, weight: Tensor, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.ranks, self.start = weight, ranks, ranks.rank * len(weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        own = ids - self.start
        elsewhere = (own < 0) | (own >= len(self.weight))
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.sum(rows.masked_fill_(elsewhere.unsqueeze(-1), 0))


class Scaled(nn.Module):
    """An embedding times a number that is first rounded to the weights' type, as those who trained it did."""

    def __init__(self, embedding: nn.Module, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding, self.scale = embedding, torch.tensor(scale, dtype=dtype).item()

    def forward(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return self.embedding(ids) * self.scale
