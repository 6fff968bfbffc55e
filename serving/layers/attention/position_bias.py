"""What a layer adds to its scores by where key and query stand.

Knows no cache, no mask and no rank: it is given the heads that this device computes.
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class PositionBias(Protocol):
    """Makes a bias of positions; one object may serve many layers, and is then computed once for all of them."""

    @property
    def heads(self) -> int:
        """Heads that have a bias of their own."""
        ...

    def __hash__(self) -> int:
        """Masks are found by the bias that is in them."""
        ...

    def __call__(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Positions of keys [context] and queries [rows, query_length] -> [rows, heads, query_length, context]."""
        ...


class LinearBias:
    """Scores fall with the distance between key and query (ALiBi: Press et al. 2021, arXiv:2108.12409).

    Args:
        slopes: what every head's scores lose a position, [heads] in float32.
    """

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    @property
    def heads(self) -> int:
        """See `PositionBias`."""
        return len(self.slopes)

    def __call__(self, keys: Tensor, queries: Tensor) -> Tensor:
        """See `PositionBias`."""
        # Of the distance, never of the key's position alone, which softmax could not tell from it: near keys stay
        # exact when the mask is rounded to a narrow type, and what far ones lose there has no weight.
        return (keys - queries.unsqueeze(-1)).unsqueeze(1) * self.slopes.view(-1, 1, 1)


class RelativeBias:
    """T5's learned bias (Raffel et al. 2019, arXiv:1910.10683): one number a head and bucket of distances.

    Args:
        weight: [buckets, heads].
        reach: from this distance on, all are in one bucket.
        bidirectional: half of the buckets are for keys behind the query; otherwise those count as the query's own.
    """

    def __init__(self, weight: Tensor, reach: int, *, bidirectional: bool) -> None:
        self._least, self._most = -reach, reach if bidirectional else 0
        buckets = _buckets(torch.arange(self._least, self._most + 1), len(weight), reach, bidirectional=bidirectional)
        self._by_distance = weight[buckets.to(weight.device)].t().contiguous()  # [heads, distances]

    @property
    def heads(self) -> int:
        """See `PositionBias`."""
        return len(self._by_distance)

    def __call__(self, keys: Tensor, queries: Tensor) -> Tensor:
        """See `PositionBias`."""
        distances = keys - queries.unsqueeze(-1)
        return self._by_distance[:, distances.clamp_(self._least, self._most).sub_(self._least)].transpose(0, 1)


def _buckets(distances: Tensor, count: int, reach: int, *, bidirectional: bool) -> Tensor:
    """Near distances have a bucket each, farther ones share it in logarithmic steps."""
    first = torch.zeros_like(distances)
    if bidirectional:
        count //= 2
        first = (distances > 0) * count
        far = distances.abs()
    else:
        far = -distances
    near = count // 2
    # In float32 and in this order, as those who trained the models did: at a step's edge the rounding decides.
    steps = (far.clamp(min=1).float() / near).log() / math.log(reach / near) * (count - near)
    return first + torch.where(far < near, far, (near + steps.long()).clamp(max=count - 1))


# How a layer reads its keys, which is what the masks of layers are told apart by: within a window, all of them, or all
# of them with a bias.
Reads = int | None | PositionBias


def alibi_slopes(heads: int, steepest: float = 8.0) -> list[float]:
    """The slopes of ALiBi: a geometric series that ends at 2^-`steepest`.

    Where the heads are no power of two, the first ones have the series of the next smaller power, the others every
    second one of the series that is twice as long.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-steepest * i / power) for i in range(1, power + 1)]
    return slopes + [2.0 ** (-steepest * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
