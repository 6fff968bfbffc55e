"""Block ids: which are free, how often each is used, and which text each one still holds.

Knows no sequence and no tensor.
"""

from collections import OrderedDict
from typing import NamedTuple


class _Memory(NamedTuple):
    digest: bytes
    parent: bytes
    content: bytes


class BlockAllocator:
    """Hands out block ids from 1 to `count - 1`; block 0 is where padding writes go and is never handed out.

    A block that nobody uses any more keeps its memory until it is handed out again, the longest unused first; one that
    is leased is not handed out.

    Args:
        count: blocks there are, with block 0.
    """

    def __init__(self, count: int) -> None:
        self.total = count - 1
        self._references = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count))  # in the order of eviction
        self._leases: dict[int, int] = {}  # how many there are of a block
        self._kept = 0  # leased blocks that nobody uses
        self._memories: dict[int, _Memory] = {}
        self._by_digest: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody uses, leased ones among them."""
        return len(self._free) + self._kept

    @property
    def spare(self) -> int:
        """Blocks that can be taken: nobody uses or leases them."""
        return len(self._free)

    @property
    def leased(self) -> int:
        """Blocks under a lease, used or not."""
        return len(self._leases)

    def used(self, block: int) -> bool:
        """Whether anybody uses the block."""
        return self._references[block] > 0

    def take(self) -> int:
        """A block for one user, its memory gone. Raises KeyError when there is none: ask `spare` first."""
        block, _ = self._free.popitem(last=False)
        memory = self._memories.pop(block, None)
        if memory is not None:
            del self._by_digest[memory.digest]
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One user more of a block that `find` gave."""
        if self._references[block] == 0:
            if block in self._leases:
                self._kept -= 1
            else:
                del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One user less; blocks without memory are the next to be handed out, the others the last."""
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        if block in self._leases:
            self._kept += 1
            return
        self._free[block] = None
        if block not in self._memories:
            self._free.move_to_end(block, last=False)

    def lease(self, block: int) -> None:
        """One lease more of a block that `find` gave: until the last one ends it keeps its memory, used or not."""
        if block not in self._leases and self._references[block] == 0:
            del self._free[block]
            self._kept += 1
        self._leases[block] = self._leases.get(block, 0) + 1

    def unlease(self, block: int) -> None:
        """One lease less; after the last one the block is among those that are handed out last."""
        self._leases[block] -= 1
        if self._leases[block] > 0:
            return
        del self._leases[block]
        if self._references[block] == 0:
            self._kept -= 1
            self._free[block] = None

    def remember(self, block: int, digest: bytes, parent: bytes, content: bytes) -> None:
        """Note what a fully computed block holds, unless another block holds the same.

        Args:
            digest: names `content` after `parent`.
            parent: names all that stands before.
            content: the block's token ids, packed.
        """
        if digest not in self._by_digest:
            self._by_digest[digest] = block
            self._memories[block] = _Memory(digest, parent, content)

    def find(self, digest: bytes, parent: bytes, content: bytes) -> int | None:
        """The block that holds this text; what it holds is compared, so that a digest alone is never believed."""
        block = self._by_digest.get(digest)
        if block is None or self._memories[block] != (digest, parent, content):
            return None
        return block
