"""What the engine says of its steps: the numbers behind the metrics, measured and not made up."""

import time

import pytest
from fakes import FakeRunner, byte_tokenizer

from serving.engine.engine import Engine
from serving.errors import RunnerDied
from serving.protocol import Request, SamplingParams, StopParams

STEP_S = 0.01
TOKENIZER = byte_tokenizer()


def request(length, *, n=4, logprobs=False):
    return Request(
        prompt_token_ids=list(range(10, 10 + length)),
        sampling=SamplingParams(prompt_logprobs=logprobs),
        stop=StopParams(max_new_tokens=n, ignore_eos=True),
    )


def engine(runner=None, **options):
    return Engine(
        runner or FakeRunner(block_size=4),
        TOKENIZER,
        eos_token_ids=frozenset(),
        max_step_tokens=512,
        max_rows=16,
        **options,
    )


def test_those_who_join_a_running_batch_are_counted_and_those_who_begin_one_are_not():
    made = engine()
    made.add(1, request(5))
    made.add(2, request(6))
    _, stats = made.step()
    assert (stats.started, stats.joined, stats.join_s) == (2, 0, 0.0)
    made.add(3, request(7))
    _, stats = made.step()
    assert (stats.started, stats.joined) == (1, 1)
    assert stats.join_s > 0
    _, stats = made.step()
    assert (stats.started, stats.joined, stats.join_s) == (0, 0, 0.0)


def test_the_batch_can_come_to_prompts_and_answers_of_those_in_it():
    made = engine()
    made.add(1, request(5, n=4))
    made.add(2, request(6, n=2))
    assert made.step()[1].most_tokens == 5 + 4 + 6 + 2
    assert made.step()[1].most_tokens == 5 + 4  # the second has ended
    made.abort(1)
    assert made.load().most_tokens == 0


def test_the_prefix_cache_is_asked_for_whole_prompts_and_spares_whole_blocks():
    made = engine()
    made.add(1, request(10))
    _, stats = made.step()
    assert (stats.queried_tokens, stats.cached_tokens, stats.prompt_tokens) == (10, 0, 10)
    made.add(2, request(10))
    _, stats = made.step()
    assert (stats.queried_tokens, stats.cached_tokens, stats.prompt_tokens) == (10, 8, 2)


@pytest.mark.parametrize(("caching", "logprobs"), [(False, False), (True, True)])
def test_a_prompt_that_is_not_looked_up_is_not_counted_as_a_miss(caching, logprobs):
    made = engine(prefix_caching=caching)
    made.add(1, request(10, logprobs=logprobs))
    assert made.step()[1].queried_tokens == 0


def test_every_part_of_a_step_has_its_own_time():
    made = engine(FakeRunner(delay_s=STEP_S))
    made.add(1, request(5, n=1))
    _, stats = made.step()
    assert stats.forward_s >= STEP_S
    assert stats.decode_s > 0
    assert stats.filter_s > 0
    assert stats.forward_s + stats.decode_s + stats.filter_s <= stats.step_s


def test_a_gap_is_the_time_since_the_sequences_own_token_before():
    made = engine(FakeRunner(delay_s=STEP_S))
    made.add(1, request(5))
    made.add(2, request(6))
    assert made.step()[1].gaps == ()  # a first token has none before it
    made.add(3, request(7))
    ((seconds, sequences),) = made.step()[1].gaps
    assert sequences == 2
    assert seconds >= STEP_S
    assert sum(count for _, count in made.step()[1].gaps) == 3


def test_each_sequence_with_a_token_says_how_many_more_it_got():
    made = engine()
    made.add(1, request(5))
    made.add(2, request(6))
    assert made.step()[1].skipped == (0, 0)


def test_the_first_output_alone_tells_how_it_came_to_be():
    made = engine(FakeRunner(delay_s=STEP_S))
    handed_over = time.monotonic() - 1.0  # it lay in the inbox for a second
    made.add(1, request(5), handed_over)
    before = time.monotonic()
    (first,), _ = made.step()
    (second,), _ = made.step()
    assert second.first is None
    assert first.first.arrived == handed_over
    assert before <= first.first.begun
    assert first.first.begun + STEP_S <= first.first.reached <= time.monotonic()


def test_the_time_in_the_inbox_is_time_in_the_queue():
    made = engine()
    made.add(1, request(5, n=1), time.monotonic() - 1.0)
    (output,), _ = made.step()
    assert output.finish.queue_s >= 1.0


def test_a_step_that_the_device_died_with_can_be_told_of():
    made = engine(FakeRunner(die_after=1))
    made.add(1, request(5))
    made.step()
    with pytest.raises(RunnerDied):
        made.step()
    lost = made.lost_step()
    assert (lost.failed, lost.rows, lost.prompt_tokens) == (True, 1, 0)
