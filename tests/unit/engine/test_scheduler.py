import pytest
from fakes import byte_tokenizer

from serving.engine.block_manager import BlockManager
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.protocol import Request, SamplingParams, StopParams

TOKENIZER = byte_tokenizer()


def sequence(number, length, read=0):
    request = Request(
        prompt_token_ids=[2 + (number + at) % 250 for at in range(length)],
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=5),
        encoder_token_ids=[9] * read,
    )
    return Sequence.start(number, request, tokenizer=TOKENIZER, eos_token_ids=frozenset(), arrived=0.0)


def scheduler(*lengths, block_count=64, budget=16, rows=8):
    made = Scheduler(BlockManager(block_count, 4), max_step_tokens=budget, max_rows=rows)
    sequences = [sequence(number, length) for number, length in enumerate(lengths)]
    for waiting in sequences:
        made.add(waiting)
    return made, sequences


def advance(made):
    """One step in which every row that ends what is known gets token 7: the rows as (id, position, tokens)."""
    step = made.schedule()
    rows = [(row.sequence_id, row.position, len(row.token_ids)) for row in step.plan.rows]
    made.commit(step)
    for stepped, row in zip(step.rows, step.plan.rows, strict=True):
        if row.sample:
            stepped.token_ids.append(7)
    return rows


def test_the_budget_is_spent_in_the_order_of_arrival():
    made, _ = scheduler(10, 10, 10)
    assert advance(made) == [(0, 0, 10), (1, 0, 6)]
    assert advance(made) == [(0, 10, 1), (1, 6, 4), (2, 0, 10)]
    assert advance(made) == [(0, 11, 1), (1, 10, 1), (2, 10, 1)]


def test_no_step_has_more_rows_than_allowed():
    made, sequences = scheduler(1, 1, 1, rows=2)
    assert [row[0] for row in advance(made)] == [0, 1]
    made.remove(sequences[0])
    assert [row[0] for row in advance(made)] == [1, 2]


def test_a_row_samples_only_when_it_ends_what_is_known():
    made, _ = scheduler(20)
    first = made.schedule()
    made.commit(first)
    assert [row.sample for row in first.plan.rows] == [False]
    assert [row.sample for row in made.schedule().plan.rows] == [True]


def test_the_table_covers_the_rows_positions_and_no_more():
    made, _ = scheduler(30)
    for blocks in (4, 8):
        step = made.schedule()
        assert [len(row.block_table) for row in step.plan.rows] == [blocks]
        made.commit(step)


def test_the_youngest_goes_back_to_the_head_of_the_queue_and_keeps_nothing():
    made, (old, young, later) = scheduler(6, 6, 6, block_count=6)
    advance(made)
    while not (step := made.schedule()).preempted:
        made.commit(step)
        for running in step.rows:
            running.token_ids.append(7)
    assert list(step.rows) == [old]
    assert list(made.waiting) == [young, later]
    assert (young.blocks, young.computed, young.running) == ([], 0, False)


def test_a_prompt_is_let_in_only_when_all_of_it_fits():
    made, (first, second) = scheduler(8, 24, block_count=8, budget=8)
    advance(made)
    assert list(made.waiting) == [second]
    advance(made)
    assert list(made.waiting) == [second]
    made.remove(first)
    assert advance(made) == [(1, 0, 8)]


def test_those_let_in_leave_each_other_room_to_grow():
    made, (_, second) = scheduler(4, 4, block_count=3)
    assert advance(made) == [(0, 0, 4)]
    assert list(made.waiting) == [second]


def test_two_that_come_together_do_not_share_what_is_not_computed_yet():
    made, _ = scheduler(8)
    made.add(sequence(0, 8))
    step = made.schedule()
    tables = [row.block_table for row in step.plan.rows]
    assert len(tables) == 2
    assert not set(tables[0]) & set(tables[1])


def test_the_cache_spares_prompt_tokens():
    made, (first,) = scheduler(14)
    advance(made)
    made.remove(first)
    made.add(sequence(0, 14))
    step = made.schedule()
    assert step.cached_tokens == 12
    assert step.plan.rows[0].position == 12


@pytest.mark.parametrize("length", [253, 1000])
def test_who_fits_in_no_pool_is_out_and_blocks_nobody(length):
    made, (big, small) = scheduler(length, 3)
    step = made.schedule()
    assert step.hopeless == [big]
    assert list(step.rows) == [small]


def test_what_an_encoder_reads_is_part_of_the_budget_once():
    made, _ = scheduler(budget=16)
    for number, read in enumerate((10, 30, 3)):
        made.add(sequence(number, 1, read))
    first = made.schedule()
    assert [new.encoder_token_ids for new in first.plan.started] == [[9] * 10, [9] * 30]
    assert first.prompt_tokens == 40
    made.commit(first)
    for row in first.rows:
        row.token_ids.append(7)
    second = made.schedule()
    assert [row.sequence_id for row in second.plan.rows] == [0, 1, 2]
    assert [len(new.encoder_token_ids) for new in second.plan.started] == [3]
    assert second.prompt_tokens == 3


def test_a_suspect_is_computed_alone_until_it_has_a_token():
    made, (_, suspect, _) = scheduler(3, 20, 3)
    suspect.deaths = 2
    assert advance(made) == [(0, 0, 3)]
    assert advance(made) == [(1, 0, 16)]
    assert advance(made) == [(1, 16, 4)]
    suspect.deaths = 0
    assert advance(made) == [(0, 3, 1), (1, 20, 1), (2, 0, 3)]


def test_what_a_failed_row_computed_is_found_by_nobody():
    made, (broken, _) = scheduler(12, 12)
    step = made.schedule()
    made.commit(step, failed={0})
    assert broken.computed == 0
    made.remove(broken)
    again = sequence(0, 12)
    assert made.blocks.lookup(again) == []
    made.add(again)
    made.commit(made.schedule())
    assert len(made.blocks.lookup(sequence(0, 12))) > 0
