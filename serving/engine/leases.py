"""Leases: which blocks sessions keep in the prefix cache, and which session's have to give way.

Knows no sequence and no text; the blocks are the allocator's.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from serving.engine.block_allocator import BlockAllocator

Key = tuple[str, str]  # a tenant's salt and the name of one of its sessions: no tenant can end or renew another's


class _Lease(NamedTuple):
    blocks: Sequence[int]
    expires: float


class Leases:
    """Keeps blocks that nobody uses from being handed out, as long as there are others and the lease lives.

    Together they never keep more than `most` blocks; beyond that, and wherever blocks run short, the session that was
    not heard of for the longest time loses its lease. So nobody is refused anything because of leases.

    Args:
        most: blocks that leases may keep.
    """

    def __init__(self, allocator: BlockAllocator, most: int) -> None:
        self._allocator = allocator
        self._most = most
        self._leases: OrderedDict[Key, _Lease] = OrderedDict()  # the longest unheard of first
        self._due: list[tuple[float, Key]] = []  # a heap; entries of leases that are gone are passed over
        self._noted: set[tuple[float, Key]] = set()  # what is in it: not an entry for every request of a session

    def __len__(self) -> int:
        return len(self._leases)

    def keep(self, key: Key, blocks: Sequence[int], expires: float) -> None:
        """Lease these blocks in place of those that the session had; of too many, the first.

        Args:
            blocks: each holds remembered text.
            expires: seconds of `time.monotonic()`.
        """
        blocks = blocks[: self._most]
        if not blocks:
            return
        for block in blocks:
            self._allocator.lease(block)
        if key in self._leases:
            self._let_go(key)
        if (expires, key) not in self._noted:
            self._noted.add((expires, key))
            heapq.heappush(self._due, (expires, key))
        self._leases[key] = _Lease(blocks, expires)
        while self._allocator.leased > self._most:
            self._let_go(next(iter(self._leases)))

    def end(self, key: Key) -> None:
        """Give a session's blocks back; unknown ones have none."""
        if key in self._leases:
            self._let_go(key)

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        while self._due and self._due[0][0] <= now:
            due = heapq.heappop(self._due)
            self._noted.remove(due)
            _, key = due
            if key in self._leases and self._leases[key].expires <= now:
                self._let_go(key)

    def give_way(self, blocks: int) -> None:
        """End leases until so many blocks can be taken, or none is left."""
        while self._leases and self._allocator.spare < blocks:
            self._let_go(next(iter(self._leases)))

    def _let_go(self, key: Key) -> None:
        for block in reversed(self._leases.pop(key).blocks):  # the deepest is handed out first
            self._allocator.unlease(block)
