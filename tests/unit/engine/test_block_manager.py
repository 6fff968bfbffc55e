import pytest
from fakes import byte_tokenizer

from serving.engine import block_manager
from serving.engine.block_manager import BlockManager
from serving.engine.sequence import Sequence
from serving.protocol import Request, SamplingParams, StopParams

TOKENIZER = byte_tokenizer()


def sequence(ids, *, salt="", prompt_logprobs=False, read=()):
    request = Request(
        prompt_token_ids=list(ids),
        sampling=SamplingParams(prompt_logprobs=prompt_logprobs),
        stop=StopParams(max_new_tokens=5),
        cache_salt=salt,
        encoder_token_ids=list(read),
    )
    return Sequence.start(0, request, tokenizer=TOKENIZER, eos_token_ids=frozenset(), arrived=0.0)


def compute(blocks, made):
    """Take a sequence through the device: what is known is computed."""
    assert blocks.reserve(made, len(made.token_ids))
    made.computed = len(made.token_ids)
    blocks.remember(made)
    return made


def after(blocks, ids, **options):
    """The manager when a sequence with these ids came and went."""
    made = compute(blocks, sequence(ids, **options))
    blocks.release(made)
    return blocks


def test_reserving_takes_what_the_positions_need_and_no_more():
    blocks = BlockManager(8, 4)
    made = sequence(range(9))
    assert blocks.reserve(made, 4)
    assert len(made.blocks) == 1
    assert blocks.reserve(made, 5)
    assert len(made.blocks) == 2
    assert (blocks.used, blocks.free, blocks.total) == (2, 5, 7)


def test_reserving_too_much_takes_nothing():
    blocks = BlockManager(3, 4)
    made = sequence(range(9))
    assert not blocks.reserve(made, 9)
    assert made.blocks == []
    assert blocks.free == 2


def test_releasing_gives_everything_back():
    blocks = BlockManager(8, 4)
    made = compute(blocks, sequence(range(9)))
    blocks.release(made)
    assert (made.blocks, made.computed, made.remembered, blocks.used) == ([], 0, 0, 0)


@pytest.mark.parametrize(("length", "blocks_found"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_one_token_is_always_left_to_compute(length, blocks_found):
    blocks = after(BlockManager(16, 4), range(16))
    assert len(blocks.lookup(sequence(range(length)))) == blocks_found


def test_only_the_common_beginning_is_found():
    blocks = after(BlockManager(16, 4), range(12))
    assert len(blocks.lookup(sequence([*range(4), 99, *range(5, 12)]))) == 1
    assert blocks.lookup(sequence([99, *range(1, 12)])) == []


def test_generated_tokens_are_remembered_too():
    blocks = BlockManager(16, 4)
    made = compute(blocks, sequence(range(6)))
    made.token_ids += [50, 51, 52]
    compute(blocks, made)
    blocks.release(made)
    assert len(blocks.lookup(sequence([*range(6), 50, 51, 52]))) == 2


def test_tenants_do_not_share():
    blocks = after(BlockManager(16, 4), range(12), salt="a")
    assert blocks.lookup(sequence(range(12), salt="b")) == []
    assert blocks.lookup(sequence(range(12))) == []
    assert len(blocks.lookup(sequence(range(12), salt="a"))) == 2


def test_answers_to_other_texts_do_not_share_and_those_to_one_do():
    blocks = after(BlockManager(16, 4), range(12), read=[5, 6])
    assert blocks.lookup(sequence(range(12))) == []
    assert blocks.lookup(sequence(range(12), read=[5])) == []
    assert blocks.lookup(sequence(range(12), read=[5, 6], salt="a")) == []
    assert len(blocks.lookup(sequence(range(12), read=[5, 6]))) == 2


def test_what_was_read_is_never_taken_for_what_was_written():
    blocks = after(BlockManager(16, 4), [*range(4), *range(20, 24)])
    assert blocks.lookup(sequence(range(20, 25), read=range(4))) == []


def test_a_block_that_is_still_being_computed_is_not_found():
    blocks = BlockManager(16, 4)
    made = sequence(range(12))
    assert blocks.reserve(made, 12)
    made.computed = 7
    blocks.remember(made)
    assert len(blocks.lookup(sequence(range(12)))) == 1


def test_prompt_log_probabilities_need_every_position():
    blocks = after(BlockManager(16, 4), range(12), prompt_logprobs=True)
    wanting = sequence(range(12), prompt_logprobs=True)
    assert blocks.lookup(wanting) == []
    wanting.prompt_logprobs = [0.0] * 11
    assert len(blocks.lookup(wanting)) == 2
    assert len(blocks.lookup(sequence(range(12)))) == 2


def test_without_prefix_caching_nothing_is_found():
    blocks = after(BlockManager(16, 4, prefix_caching=False), range(12))
    assert blocks.lookup(sequence(range(12))) == []


def test_parents_outlive_children():
    blocks = after(BlockManager(4, 4), range(12))
    other = sequence([99] * 4)
    assert blocks.reserve(other, 4)
    assert len(blocks.lookup(sequence(range(13)))) == 2


def test_found_blocks_that_nobody_uses_still_cost_free_ones():
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(range(4)))
    blocks = after(blocks, range(8))
    found = blocks.lookup(sequence(range(12)))
    assert len(found) == 2
    assert blocks.free_needed(12, found) == 2


def test_a_long_sequence_is_not_digested_again_each_step(monkeypatch):
    blocks = BlockManager(64, 4)
    made = compute(blocks, sequence(range(200)))
    digests = []
    monkeypatch.setattr(block_manager, "_digest", lambda content: digests.append(content) or b"digest")
    for token_id in range(4):
        made.token_ids.append(token_id)
        compute(blocks, made)
    assert len(digests) == 1
