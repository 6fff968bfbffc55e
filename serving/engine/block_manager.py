"""The blocks of sequences: reserving, releasing, and finding computed ones again.

Knows no queue and no budget: who gets blocks first is the scheduler's matter.
"""

import hashlib
from array import array

from serving.engine.block_allocator import BlockAllocator
from serving.engine.leases import Key, Leases
from serving.engine.sequence import Sequence
from serving.protocol import Request

DIGEST_BYTES = 16


class BlockManager:
    """Keeps each sequence's block table in step with what is to be computed.

    A full block is named by a digest of its token ids and of its parent's name, from a root made of the request's
    `cache_salt` and adapter and of the text that an encoder reads; so a name stands for all that the block's content
    depends on.

    Args:
        count: blocks there are, with block 0, which is never handed out.
        size: tokens a block holds.
        lease_share: how much of all blocks sessions may keep; see `Leases`.
    """

    def __init__(self, count: int, size: int, *, prefix_caching: bool = True, lease_share: float = 0.0) -> None:
        self._allocator = BlockAllocator(count)
        self._leases = Leases(self._allocator, int(self._allocator.total * lease_share))
        self._size = size
        self._prefix_caching = prefix_caching

    @property
    def total(self) -> int:
        """Blocks that can be handed out."""
        return self._allocator.total

    @property
    def free(self) -> int:
        """Blocks that no sequence uses."""
        return self._allocator.free

    @property
    def used(self) -> int:
        """Blocks that at least one sequence uses."""
        return self._allocator.total - self._allocator.free

    @property
    def leased(self) -> int:
        """Blocks that sessions keep, used or not."""
        return self._allocator.leased

    def needed(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self._size)

    def lookup(self, sequence: Sequence) -> list[int]:
        """The remembered blocks that the sequence's text begins with; at least one token is left to compute.

        Nothing is taken: `start` does that, before any other block is.
        """
        if sequence.wants_prompt_logits:
            return []
        return self._find(sequence, (len(sequence.token_ids) - 1) // self._size)

    def queried(self, sequence: Sequence) -> int:
        """Tokens of the sequence that `lookup` asks about."""
        return len(sequence.token_ids) if self._prefix_caching and not sequence.wants_prompt_logits else 0

    def free_needed(self, tokens: int, found: list[int]) -> int:
        """Free blocks that it takes to hold so many tokens, of which `found` holds the first."""
        shared = sum(map(self._allocator.used, found))
        return self.needed(tokens) - shared

    def start(self, sequence: Sequence, found: list[int]) -> None:
        """Begin a sequence without blocks with those that `lookup` found."""
        for block in found:
            self._allocator.share(block)
        sequence.blocks = found
        sequence.computed = len(found) * self._size
        sequence.remembered = len(found)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first `tokens` tokens; False, and nothing taken, when too few are free."""
        missing = -(-tokens // self._size) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self._allocator.free:
            return False
        self._leases.give_way(missing)
        sequence.blocks += [self._allocator.take() for _ in range(missing)]
        return True

    def remember(self, sequence: Sequence) -> None:
        """Offer the blocks that were filled since the last time to those that come after."""
        if not self._prefix_caching:
            return
        for index in range(sequence.remembered, sequence.computed // self._size):
            self._allocator.remember(sequence.blocks[index], *self._name(sequence, index))
            sequence.remembered += 1

    def retire(self, sequence: Sequence, now: float) -> None:
        """Take back all blocks of a sequence that ended; a session's stay remembered while its lease lives."""
        session = sequence.session
        if session is not None and session.expires > now:
            computed = self._find(sequence, sequence.computed // self._size)
            self._leases.keep((sequence.request.cache_salt, session.id), computed, session.expires)
        self.release(sequence)

    def expire_leases(self, now: float) -> None:
        """Let go of what sessions kept whose time is over; `now` is `time.monotonic()`."""
        self._leases.expire(now)

    def end_lease(self, key: Key) -> None:
        """Let go of what a session kept."""
        self._leases.end(key)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, the deepest first: it is handed out before those without which it is worthless."""
        for block in reversed(sequence.blocks):
            self._allocator.release(block)
        sequence.blocks = []
        sequence.computed = 0
        sequence.remembered = 0

    def _find(self, sequence: Sequence, most: int) -> list[int]:
        """The remembered blocks among the first `most` of the sequence's text; they need not be its own."""
        blocks: list[int] = []
        if not self._prefix_caching:
            return blocks
        for index in range(most):
            block = self._allocator.find(*self._name(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _name(self, sequence: Sequence, index: int) -> tuple[bytes, bytes, bytes]:
        """(digest, parent, content) of one full block; the chain up to it was named before, or is one short."""
        digests = sequence.digests
        content = array("I", sequence.token_ids[index * self._size : (index + 1) * self._size]).tobytes()
        parent = digests[index - 1] if index else _root(sequence.request)
        if index == len(digests):
            digests.append(_digest(parent + content))
        return digests[index], parent, content


def _root(request: Request) -> bytes:
    root = _digest(request.cache_salt.encode("utf-8", "surrogatepass"))
    # Lengths that no block's content has: what was read must not be taken for what was written.
    if request.adapter:
        root = _digest(b"adapter:" + root + request.adapter.to_bytes(8, "little"))
    if request.encoder_token_ids:
        root = _digest(b"read:" + root + array("I", request.encoder_token_ids).tobytes())
    return root


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
