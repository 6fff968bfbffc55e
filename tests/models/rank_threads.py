"""Ranks that are threads of one process: what a model's ranks say to one another, without the cost of processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class RankThread:
    """`parallel.Ranks` for one of several threads that share a table."""

    def __init__(self, rank, size, table, barrier):
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier

    def _everybodys(self, value):
        self._barrier.wait(60)
        self._table[self.rank] = value
        self._barrier.wait(60)
        return list(self._table)

    def sum(self, x):
        total = torch.stack(self._everybodys(x)).sum(0)
        self._barrier.wait(60)
        return x.copy_(total)  # as a collective overwrites what it is given

    def gather(self, x):
        parts = self._everybodys(x)
        return torch.cat(parts, -1) if self.rank == 0 else x

    def smallest(self, number):
        return min(self._everybodys(number))


def on_ranks(size, function):
    """What `function(ranks)` returns on rank 0; a failure of any rank is raised."""
    table, barrier = [None] * size, threading.Barrier(size)

    def one(rank):
        try:
            return function(RankThread(rank, size, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        failures = [error for future in futures if (error := future.exception())]
        # The others only say that the barrier broke.
        for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return futures[0].result()
