"""Mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538): who computes a token, and the computing.

Knows no checkpoint and no number format: it is given the experts' own layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from serving.parallel import Ranks


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's layers: [rows, hidden] -> gate beside up, and back."""

    gate_up: nn.Module
    down: nn.Module


class Router(nn.Module):
    """Chooses `chosen` experts for every token by the softmax of their scores.

    Args:
        scores: [tokens, hidden] -> [tokens, experts].
        normalized: whether the shares of those chosen are made to sum to one.
    """

    def __init__(self, scores: nn.Module, chosen: int, normalized: bool) -> None:
        super().__init__()
        self.scores, self.chosen, self.normalized = scores, chosen, normalized

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> shares in float32 and ids of the experts, each [tokens, chosen]."""
        shares, ids = self.scores(x).float().softmax(-1).topk(self.chosen, -1)
        return shares / shares.sum(-1, keepdim=True) if self.normalized else shares, ids


class LoopedExperts(nn.Module):
    """Expert after expert, each over the tokens that chose it: the slow twin of every grouped kernel.

    A token's result does not depend on its batch mates: its experts are added in the order of their numbers.
    """

    def __init__(self, experts: Sequence[Expert], gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.experts, self.gate = list(experts), gate

    def forward(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        """x [tokens, hidden], shares and ids [tokens, chosen] -> [tokens, hidden]; sums are in float32."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        order = ids.flatten().argsort(stable=True)
        token, share = order // ids.shape[1], shares.flatten()[order].unsqueeze(-1)
        counts = torch.bincount(ids.flatten(), minlength=len(self.experts)).tolist()
        spans = zip(self.experts, token.split(counts), share.split(counts), strict=True)
        for expert, tokens, part in spans:
            if len(tokens):
                computed = expert.down(self.gate(expert.gate_up(x[tokens])))
                total.index_add_(0, tokens, computed.float() * part)
        return total.to(x.dtype)


class SummedExperts(nn.Module):
    """Experts of which every rank has a part: the parts' results are added."""

    def __init__(self, experts: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.experts, self.ranks = experts, ranks

    def forward(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        """See `LoopedExperts`."""
        return self.ranks.sum(self.experts(x, shares, ids))


def make_experts(experts: Sequence[Expert], gate: Callable[[Tensor], Tensor]) -> nn.Module:
    """The layer with the fastest kernel for these experts; a grouped one is chosen here."""
    return LoopedExperts(experts, gate)
