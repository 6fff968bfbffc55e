import pytest

from serving.engine.block_allocator import BlockAllocator


def remembering(count, names):
    """An allocator of which the blocks 1, 2, ... were computed, remembered under these names and released."""
    allocator = BlockAllocator(count)
    for name in names:
        block = allocator.take()
        allocator.remember(block, name, b"parent", name)
    for block in range(1, len(names) + 1):
        allocator.release(block)
    return allocator


def test_block_0_is_never_handed_out():
    allocator = BlockAllocator(4)
    assert sorted(allocator.take() for _ in range(3)) == [1, 2, 3]
    assert allocator.free == 0
    with pytest.raises(KeyError):
        allocator.take()


def test_a_shared_block_is_free_when_its_last_user_is_gone():
    allocator = remembering(3, [b"a"])
    block = allocator.find(b"a", b"parent", b"a")
    allocator.share(block)
    allocator.share(block)
    allocator.release(block)
    assert allocator.used(block)
    assert allocator.free == 1
    allocator.release(block)
    assert not allocator.used(block)
    assert allocator.free == 2


def test_a_freed_block_keeps_its_memory_until_it_is_handed_out():
    allocator = remembering(2, [b"a"])
    assert allocator.find(b"a", b"parent", b"a") == 1
    assert allocator.take() == 1
    assert allocator.find(b"a", b"parent", b"a") is None


def test_the_longest_unused_memory_goes_first():
    allocator = remembering(4, [b"a", b"b", b"c"])
    allocator.share(1)
    allocator.release(1)
    assert [allocator.take() for _ in range(3)] == [2, 3, 1]


def test_blocks_without_memory_go_before_those_with():
    allocator = remembering(3, [b"a"])
    blank = allocator.take()
    allocator.release(blank)
    assert [allocator.take(), allocator.take()] == [blank, 1]


def test_a_digest_alone_is_not_believed():
    allocator = remembering(2, [b"a"])
    assert allocator.find(b"a", b"parent", b"other tokens") is None
    assert allocator.find(b"a", b"other parent", b"a") is None


def test_a_second_block_with_the_same_text_is_not_remembered():
    allocator = remembering(3, [b"a"])
    second = allocator.take()
    allocator.remember(second, b"a", b"parent", b"a")
    assert allocator.find(b"a", b"parent", b"a") == 1
    allocator.release(second)
    assert allocator.take() == second
    assert allocator.find(b"a", b"parent", b"a") == 1


def test_a_leased_block_is_free_but_not_handed_out():
    allocator = remembering(4, [b"a", b"b"])
    allocator.lease(1)
    assert (allocator.free, allocator.spare, allocator.leased) == (3, 2, 1)
    assert [allocator.take(), allocator.take()] == [3, 2]
    with pytest.raises(KeyError):
        allocator.take()
    assert allocator.find(b"a", b"parent", b"a") == 1


def test_a_leased_block_can_be_used_and_released():
    allocator = remembering(3, [b"a"])
    allocator.lease(1)
    allocator.share(1)
    assert (allocator.free, allocator.spare) == (1, 1)
    allocator.release(1)
    assert (allocator.free, allocator.spare) == (2, 1)


def test_a_block_is_leased_until_its_last_lease_ends():
    allocator = remembering(3, [b"a"])
    allocator.lease(1)
    allocator.lease(1)
    allocator.unlease(1)
    assert (allocator.spare, allocator.leased) == (1, 1)
    allocator.unlease(1)
    assert (allocator.spare, allocator.leased) == (2, 0)
    assert [allocator.take(), allocator.take()] == [2, 1], "its memory goes last"


def test_a_lease_may_end_while_the_block_is_used():
    allocator = remembering(3, [b"a"])
    allocator.lease(1)
    allocator.share(1)
    allocator.unlease(1)
    assert (allocator.free, allocator.spare) == (1, 1)
    allocator.release(1)
    assert (allocator.free, allocator.spare) == (2, 2)
