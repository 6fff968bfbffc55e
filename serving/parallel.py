"""The ranks that compute one model together: torch.distributed behind one small interface.

Knows no layer and no plan. Every rank makes the same calls in the same order; a rank that ends leaves the others
waiting, which is for whoever started them to notice.
"""

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Ranks wait for one another while weights load from a slow disk; that one has died is noticed elsewhere.
_TIMEOUT = timedelta(minutes=30)


class Ranks(Protocol):
    """What one rank knows of the others.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, the same bits on every rank; may overwrite `x`."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` [..., n] side by side [..., size * n] on rank 0; on others what it is does not matter."""
        ...

    def smallest(self, number: int) -> int:
        """The smallest of every rank's number."""
        ...


class OneRank:
    """A device that computes its model alone."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        return x

    def smallest(self, number: int) -> int:
        """See `Ranks`."""
        return number


class DistributedRanks:
    """One process a rank: NCCL (or RCCL) between GPUs, gloo between processes on a CPU. They part when they exit.

    Args:
        meeting_file: where the ranks find one another; the same file that does not exist yet, for all of them.
        device: where this rank's tensors are.
    """

    def __init__(self, rank: int, size: int, meeting_file: str, device: torch.device) -> None:
        self.rank, self.size, self._device = rank, size, device
        store = dist.FileStore(meeting_file, size)  # type: ignore[attr-defined]  # public, and not in its stubs
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0)
        return x if parts is None else torch.cat(parts, -1)

    def smallest(self, number: int) -> int:
        """See `Ranks`."""
        held = torch.tensor(number, device=self._device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)
