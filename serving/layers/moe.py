"""Mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538): who computes a token, and the computing.

Knows no checkpoint and no number format: it is given the experts' own layers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.layers.linear import make_linear
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


class GroupRouter(nn.Module):
    """Chooses among the experts of the best groups, by the softmax of their scores (DeepSeek-AI 2024,
    arXiv:2405.04434, section 2.2.2). A group is as good as its best expert.

    Args:
        scores: [tokens, hidden] -> [tokens, experts], in float32.
        groups: how many groups the experts stand in, one beside the other.
        factor: what the shares are multiplied by.
    """

    def __init__(self, scores: nn.Module, *, chosen: int, groups: int, chosen_groups: int, factor: float) -> None:
        super().__init__()
        self.scores, self.chosen, self.factor = scores, chosen, factor
        self.groups, self.chosen_groups = groups, chosen_groups

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> shares in float32 and ids of the experts, each [tokens, chosen]."""
        shares = self.scores(x).softmax(-1)
        if self.chosen_groups < self.groups:
            grouped = shares.unflatten(-1, (self.groups, -1))
            shares = _within_best(grouped, grouped.amax(-1), self.chosen_groups, 0.0)
        shares, ids = shares.topk(self.chosen, -1)
        return shares * self.factor, ids


class BiasedRouter(nn.Module):
    """Scores every expert by itself and chooses, among the best groups, by scores to which a learned bias is added
    (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2). A group is as good as its best two experts together.

    Args:
        scores: [tokens, hidden] -> [tokens, experts], in float32.
        bias: for the choice alone, not for the shares: [experts], in float32.
        groups: how many groups the experts stand in, one beside the other.
        normalized: whether the shares of those chosen are made to sum to one.
        factor: what the shares are multiplied by.
    """

    def __init__(
        self, scores: nn.Module, bias: Tensor, *, chosen: int, groups: int, chosen_groups: int, normalized: bool,
        factor: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scores, self.bias, self.chosen, self.normalized, self.factor = scores, bias, chosen, normalized, factor
        self.groups, self.chosen_groups = groups, chosen_groups

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> shares in float32 and ids of the experts, each [tokens, chosen]."""
        scores = self.scores(x).sigmoid()
        biased = scores + self.bias
        if self.chosen_groups < self.groups:
            grouped = biased.unflatten(-1, (self.groups, -1))
            biased = _within_best(grouped, grouped.topk(2, -1).values.sum(-1), self.chosen_groups, float("-inf"))
        ids = biased.topk(self.chosen, -1).indices
        shares = scores.gather(-1, ids)
        if self.normalized:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return shares * self.factor, ids


def _within_best(grouped: Tensor, worth: Tensor, count: int, other: float) -> Tensor:
    """grouped [tokens, groups, size], worth [tokens, groups] -> [tokens, groups * size], `other` outside the best."""
    best = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(count, -1).indices, True)
    return grouped.masked_fill(~best.unsqueeze(-1), other).flatten(1)


class LoopedExperts(nn.Module):
    """Expert after expert, each over the tokens that chose it: the slow twin of `GroupedExperts`, and what takes any
    layers.

    A token's result does not depend on its batch mates: its experts are added in the order of their numbers.
    """

    def __init__(self, experts: Sequence[Expert], gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.experts, self.gate = list(experts), gate

    def forward(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        """x [tokens, hidden], shares and ids [tokens, chosen] -> [tokens, hidden]; sums are in float32."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if not len(x):
            return total.to(x.dtype)
        order = ids.flatten().argsort(stable=True)
        token, share = order // ids.shape[1], shares.flatten()[order].unsqueeze(-1)
        counts = torch.bincount(ids.flatten(), minlength=len(self.experts)).tolist()
        # What can be done for all experts at once is: a small operation for each would cost as much as its products.
        parts = [
            expert.down(self.gate(expert.gate_up(rows)))
            for expert, rows in zip(self.experts, x[token].split(counts), strict=True)
            if len(rows)
        ]
        return total.index_add_(0, token, torch.cat(parts).float() * share).to(x.dtype)


class GroupedExperts(nn.Module):
    """All experts in two products of torch's `grouped_mm`, over tokens that were sorted by expert.

    For bfloat16 on CUDA. It asks the device for nothing, so that a step can be captured. No device was there to run it
    when it was written: it was held to its twin by the implementation that torch has for a CPU.

    Args:
        gate_up: [experts, 2 * size, hidden], gate above up.
        down: [experts, hidden, size].
    """

    def __init__(self, gate_up: Tensor, down: Tensor, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down, self.gate = gate_up.transpose(1, 2), down.transpose(1, 2), gate
        self.numbers = torch.arange(len(gate_up), device=gate_up.device)

    def forward(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        """See `LoopedExperts`."""
        experts, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, self.numbers, right=True, out_int32=True)
        bent = self.gate(F.grouped_mm(x[order // ids.shape[1]], self.gate_up, offs=ends))
        computed = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
        computed[order] = F.grouped_mm(bent, self.down, offs=ends)  # back to the order of tokens
        return (computed.unflatten(0, ids.shape).float() * shares.unsqueeze(-1)).sum(1).to(x.dtype)


class SummedExperts(nn.Module):
    """Experts of which every rank has a part: the parts' results are added."""

    def __init__(self, experts: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.experts, self.ranks = experts, ranks

    def forward(self, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        """See `LoopedExperts`."""
        return self.ranks.sum(self.experts(x, shares, ids))


def make_experts(weights: Iterable[tuple[Tensor, Tensor]], count: int, gate: Callable[[Tensor], Tensor]) -> nn.Module:
    """The layer with the fastest kernel for these experts.

    Args:
        weights: of every expert, gate above up [2 * size, hidden], and down [hidden, size]; taken one by one, so that
            they need not lie there all at once beside what is made of them.
        count: how many experts there are.
    """
    coming = iter(weights)
    first = next(coming)
    pairs = chain((first,), coming)
    if not can_group(first[0]):
        return LoopedExperts(
            [Expert(make_linear(gate_up, None), make_linear(down, None)) for gate_up, down in pairs], gate
        )
    gate_ups, downs = (weight.new_empty(count, *weight.shape) for weight in first)
    for i, (gate_up, down) in enumerate(pairs):
        gate_ups[i], downs[i] = gate_up, down
    return GroupedExperts(gate_ups, downs, gate)


def can_group(gate_up: Tensor) -> bool:
    """Whether torch's grouped product takes weights of this type, place and size [2 * size, hidden]: rows of whole 16
    bytes in bfloat16, on an NVIDIA device of compute capability 8.0 or more.
    """
    if gate_up.device.type != "cuda" or gate_up.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    rows, hidden = gate_up.shape
    return rows % 16 == hidden % 8 == 0 and torch.cuda.get_device_capability(gate_up.device) >= (8, 0)
