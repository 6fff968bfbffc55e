"""What sessions keep of the prefix cache: as much as they may, as long as nobody else needs it."""

import pytest

from serving.engine.block_allocator import BlockAllocator
from serving.engine.leases import Leases

A, B, C = ("", "a"), ("", "b"), ("", "c")


@pytest.fixture
def allocator():
    """Nine blocks, of which the first six hold remembered text."""
    allocator = BlockAllocator(10)
    for number in range(1, 7):
        allocator.remember(allocator.take(), bytes([number]), b"", bytes([number]))
    for number in range(1, 7):
        allocator.release(number)
    return allocator


def test_the_first_blocks_are_kept_where_all_are_too_many(allocator):
    Leases(allocator, 2).keep(A, [1, 2, 3], 10.0)
    assert {allocator.take() for _ in range(7)} == {3, 4, 5, 6, 7, 8, 9}
    assert allocator.find(b"\x01", b"", b"\x01") == 1
    assert allocator.find(b"\x02", b"", b"\x02") == 2
    assert allocator.spare == 0


def test_a_session_keeps_its_last_sequence_only(allocator):
    leases = Leases(allocator, 9)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(A, [1, 3], 10.0)
    assert (len(leases), allocator.leased) == (1, 2)
    leases.end(A)
    assert (len(leases), allocator.leased, allocator.spare) == (0, 0, 9)


def test_nothing_to_keep_takes_nothing_away(allocator):
    leases = Leases(allocator, 9)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(A, [], 10.0)
    assert allocator.leased == 2


def test_the_longest_unheard_of_session_loses_its_lease_when_all_are_too_many(allocator):
    leases = Leases(allocator, 4)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(B, [3, 4], 10.0)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(C, [5, 6], 10.0)
    leases.end(B)
    assert allocator.leased == 4
    leases.end(A)
    assert allocator.leased == 2


def test_shared_blocks_count_once(allocator):
    leases = Leases(allocator, 3)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(B, [1, 2, 3], 10.0)
    assert (len(leases), allocator.leased) == (2, 3)


def test_leases_give_way_to_whoever_needs_blocks(allocator):
    leases = Leases(allocator, 9)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(B, [3, 4], 10.0)
    leases.give_way(5)
    assert len(leases) == 2
    leases.give_way(6)
    assert (len(leases), allocator.leased) == (1, 2), "A was not heard of for the longest time"
    leases.give_way(99)
    assert (len(leases), allocator.spare) == (0, 9)


def test_leases_end_with_their_sessions(allocator):
    leases = Leases(allocator, 9)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(B, [3], 20.0)
    leases.expire(9.9)
    assert len(leases) == 2
    leases.expire(10.0)
    assert (len(leases), allocator.leased) == (1, 1)


def test_a_lease_that_is_renewed_later_lives_on(allocator):
    leases = Leases(allocator, 9)
    leases.keep(A, [1, 2], 10.0)
    leases.keep(A, [1, 2], 20.0)
    leases.expire(15.0)
    assert len(leases) == 1
    leases.expire(20.0)
    assert len(leases) == 0


def test_the_end_of_a_session_is_noted_once_however_often_it_asks(allocator):
    leases = Leases(allocator, 9)
    for _ in range(100):
        leases.keep(A, [1, 2], 10.0)
    leases.give_way(9)
    leases.keep(A, [1, 2], 10.0)
    assert (len(leases), len(leases._due)) == (1, 1)
    leases.expire(10.0)
    assert (len(leases), len(leases._due)) == (0, 0)
    leases.keep(A, [1, 2], 10.0)
    leases.expire(10.0)
    assert len(leases) == 0


def test_without_a_share_nothing_is_kept(allocator):
    leases = Leases(allocator, 0)
    leases.keep(A, [1], 10.0)
    assert (len(leases), allocator.leased) == (0, 0)
