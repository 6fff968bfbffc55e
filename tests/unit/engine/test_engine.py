import math
import time

import msgspec
import pytest
from fakes import FakeRunner, byte_tokenizer

from serving.engine.engine import Engine
from serving.errors import RunnerDied
from serving.plan import Choice, RowResult, StepResult
from serving.protocol import FinishReason, Request, SamplingParams, Session, StopParams

TOKENIZER = byte_tokenizer()
EOS = 0
POISON = 99


class Recording(FakeRunner):
    """Keeps what it was told, copied at once: rows share the engine's lists."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.told = []

    def submit(self, plan):
        self.told.append(
            {
                "rows": {row.sequence_id: (row.position, len(row.token_ids)) for row in plan.rows},
                "started": {new.sequence_id: list(new.token_ids) for new in plan.started},
                "finished": list(plan.finished),
            }
        )
        super().submit(plan)


def ids(text):
    return TOKENIZER.encode(text)


def says(text, *, end=()):
    """A reply for FakeRunner: always this text."""
    return lambda prompt: [*ids(text), *end]


def request(prompt, *, n=8, salt="", sampling=None, **stop):
    return Request(
        prompt_token_ids=list(ids(prompt) if isinstance(prompt, str) else prompt),
        sampling=sampling or SamplingParams(),
        stop=StopParams(max_new_tokens=n, **stop),
        cache_salt=salt,
    )


def engine(runner=None, *, max_step_tokens=512, max_rows=64, **options):
    return Engine(
        runner or FakeRunner(),
        TOKENIZER,
        eos_token_ids=frozenset({EOS}),
        max_step_tokens=max_step_tokens,
        max_rows=max_rows,
        **options,
    )


def finish_all(made, *, steps=1000):
    """Step until nothing is left: the outputs by request id."""
    outputs = {}
    for _ in range(steps):
        if not made.has_work():
            return outputs
        for output in made.step()[0]:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not come to an end")


def answer(runner, asked):
    """The outputs of one request alone."""
    made = engine(runner)
    made.add(1, asked)
    return finish_all(made)[1]


# How a generation ends


def test_the_length_is_exact():
    outputs = answer(FakeRunner(reply=says("abcdefgh")), request("x", n=3))
    assert [output.tokens[0].text for output in outputs] == ["a", "b", "c"]
    assert outputs[-1].finish.reason is FinishReason.LENGTH
    assert outputs[-1].finish.text == "abc"
    assert outputs[-1].finish.generated_tokens == 3


def test_an_end_token_ends_and_is_no_text():
    outputs = answer(FakeRunner(reply=says("ab")), request("x"))
    assert outputs[-1].finish.reason is FinishReason.EOS_TOKEN
    assert outputs[-1].finish.text == "ab"
    assert outputs[-1].finish.generated_tokens == 3
    assert (outputs[-1].tokens[0].text, outputs[-1].tokens[0].special, outputs[-1].text) == ("</s>", True, "")


def test_the_length_wins_over_an_end_token():
    outputs = answer(FakeRunner(reply=says("ab")), request("x", n=3))
    assert outputs[-1].finish.reason is FinishReason.LENGTH
    assert outputs[-1].finish.text == "ab"


def test_end_tokens_can_be_ignored():
    outputs = answer(FakeRunner(reply=says("ab")), request("x", n=6, ignore_eos=True))
    assert outputs[-1].finish.reason is FinishReason.LENGTH
    assert outputs[-1].finish.text == "ab"
    assert outputs[-1].finish.generated_tokens == 6


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_end_like_end_tokens(ignore_eos):
    asked = request("x", stop_token_ids=tuple(ids("c")), ignore_eos=ignore_eos)
    outputs = answer(FakeRunner(reply=says("abcdef")), asked)
    assert outputs[-1].finish.reason is FinishReason.EOS_TOKEN
    assert outputs[-1].finish.text == "ab"
    assert outputs[-1].tokens[0].text == "c"


@pytest.mark.parametrize(("keep", "text"), [(True, "one two"), (False, "one ")])
def test_a_stop_string_ends_and_cuts(keep, text):
    asked = request("x", n=50, stop_strings=("two",), keep_stop_text=keep)
    outputs = answer(FakeRunner(reply=says("one two three")), asked)
    assert outputs[-1].finish.reason is FinishReason.STOP_SEQUENCE
    assert outputs[-1].finish.text == text
    assert "".join(output.text for output in outputs) == text
    assert "".join(output.tokens[0].text for output in outputs) == "one two"


def test_held_back_text_comes_with_the_end():
    asked = request("x", n=4, stop_strings=("three",), keep_stop_text=False)
    outputs = answer(FakeRunner(reply=says("x th")), asked)
    assert [output.text for output in outputs] == ["x", " ", "", "th"]


def test_an_end_token_before_a_stop_string_wins():
    asked = request("x", stop_strings=("b</s>",))
    outputs = answer(FakeRunner(reply=says("ab")), asked)
    assert outputs[-1].finish.reason is FinishReason.EOS_TOKEN


def test_a_special_token_can_be_a_stop_string():
    asked = request("x", stop_strings=("<s>",))
    outputs = answer(FakeRunner(reply=says("ab", end=[1, *ids("cd")])), asked)
    assert outputs[-1].finish.reason is FinishReason.STOP_SEQUENCE
    assert outputs[-1].finish.text == "ab"


def test_the_prompts_text_does_not_count_for_stop_strings():
    outputs = answer(FakeRunner(reply=says("c")), request("ab", stop_strings=("bc", "ab")))
    assert outputs[-1].finish.reason is FinishReason.EOS_TOKEN


def test_text_cut_by_the_length_inside_a_character_keeps_what_was_whole():
    outputs = answer(FakeRunner(reply=says("a 😀")), request("x", n=4))
    assert outputs[-1].finish.text == "a "
    assert "".join(output.text for output in outputs) == "a "


# What else an output carries


def test_alternatives_and_prompt_log_probabilities_are_reported():
    sampling = SamplingParams(top_n_tokens=2, prompt_logprobs=True)
    outputs = answer(FakeRunner(reply=says("ab")), request("<s>héy", n=2, sampling=sampling))
    prompt = outputs[0].prompt
    assert [token.id for token in prompt] == ids("<s>héy")
    assert prompt[0].logprob is None
    assert (prompt[0].text, prompt[0].special) == ("<s>", True)
    assert all(token.logprob < 0 for token in prompt[1:])
    assert outputs[1].prompt == []
    assert [token.text for token in outputs[0].tokens[0].top] == ["a", "b"]


def test_no_prompt_is_reported_unless_asked_for():
    assert answer(FakeRunner(), request("abc", n=1))[0].prompt == []


def test_times_are_told_apart():
    made = engine(FakeRunner(delay_s=0.01, reply=says("abcd")), max_rows=1)
    made.add(1, request("x", n=3))
    made.add(2, request("y", n=2))
    outputs = finish_all(made)
    first, second = outputs[1][-1].finish, outputs[2][-1].finish
    assert first.queue_s < 0.03
    assert first.inference_s >= 0.03
    assert second.queue_s >= 0.03
    assert second.inference_s >= 0.02


def test_stats_say_what_a_step_did():
    made = engine(FakeRunner(block_size=4, block_count=16), max_step_tokens=6)
    made.add(1, request("abcdefgh", n=3, ignore_eos=True))
    made.add(2, request("x", n=3, ignore_eos=True))
    _, first = made.step()
    assert (first.rows, first.prompt_tokens, first.started, first.waiting, first.running) == (1, 6, 1, 1, 1)
    assert (first.blocks_used, first.blocks_total) == (2, 15)
    _, second = made.step()
    assert (second.rows, second.prompt_tokens, second.started, second.waiting, second.running) == (2, 2, 1, 0, 2)
    assert second.step_s >= second.forward_s > 0
    assert made.load().running == 2
    assert made.load().rows == 0


# What the device is told


def test_a_row_is_introduced_once_and_dismissed_with_the_next_plan():
    runner = Recording()
    made = engine(runner)
    made.add(1, request("abc", n=2, ignore_eos=True))
    finish_all(made)
    assert [told["started"] for told in runner.told] == [{1: ids("abc")}, {}]
    assert [told["finished"] for told in runner.told] == [[], []]
    made.add(2, request("x", n=1))
    finish_all(made)
    assert runner.told[-1]["finished"] == [1]
    assert list(runner.rows) == [2]


def test_an_aborted_row_is_dismissed_too_even_after_a_pause():
    runner = Recording()
    made = engine(runner)
    made.add(1, request("abc", n=100, ignore_eos=True))
    made.step()
    made.abort(1)
    assert not made.has_work()
    made.add(2, request("x", n=1))
    finish_all(made)
    assert runner.told[-1]["finished"] == [1]


def test_a_row_that_never_ran_is_not_dismissed():
    runner = Recording()
    made = engine(runner)
    made.add(1, request("abc"))
    made.abort(1)
    made.add(2, request("x", n=1))
    finish_all(made)
    assert runner.told[0]["finished"] == []


def test_a_preempted_row_is_not_introduced_again():
    runner = Recording(block_size=2, block_count=9)
    made = engine(runner, prefix_caching=False)
    made.add(1, request("abcd", n=8, ignore_eos=True))
    made.add(2, request("efgh", n=8, ignore_eos=True))
    preempted = started = 0
    while made.has_work():
        _, stats = made.step()
        preempted += stats.preempted
        started += stats.started
    assert preempted > 0
    assert started == 2
    assert [list(told["started"]) for told in runner.told if told["started"]] == [[1, 2]]
    assert sum(position == 0 for told in runner.told for position, _ in told["rows"].values()) > 2


def test_a_preempted_request_does_not_lose_its_place():
    made = engine(FakeRunner(block_size=2, block_count=9), prefix_caching=False)
    for request_id, prompt in enumerate(["abcd", "efgh", "ijkl", "mnop"]):
        made.add(request_id, request(prompt, n=9, ignore_eos=True))
    ended = []
    preempted = 0
    while made.has_work():
        outputs, stats = made.step()
        preempted += stats.preempted
        ended += [output.request_id for output in outputs if output.finish]
    assert preempted > 0
    assert ended == [0, 1, 2, 3]


def test_nothing_is_submitted_when_nothing_can_be_computed():
    runner = Recording(block_size=2, block_count=3)
    made = engine(runner)
    made.add(1, request("abcdefgh"))
    made.step()
    assert runner.told == []


# Fairness


def test_a_long_prompt_does_not_stall_those_who_decode():
    made = engine(max_step_tokens=8)
    made.add(1, request("x" * 100, n=50, ignore_eos=True))
    for request_id in (2, 3):
        made.add(request_id, request("y", n=50, ignore_eos=True))
    made.step()
    for _ in range(13):
        made.step()
    made.add(4, request("z" * 100, n=2, ignore_eos=True))
    for _ in range(10):
        outputs, _ = made.step()
        assert {output.request_id for output in outputs} >= {1, 2, 3}


def test_an_old_prompt_in_chunks_lets_younger_decodes_through():
    runner = Recording()
    made = engine(runner, max_step_tokens=8)
    made.add(1, request("y", n=50, ignore_eos=True))
    made.step()
    made.add(2, request("x" * 64, n=50, ignore_eos=True))
    for _ in range(5):
        outputs, _ = made.step()
        assert [output.request_id for output in outputs] == [1]
        assert runner.told[-1]["rows"][2][1] == 7


def test_the_queue_is_first_in_first_out():
    made = engine(FakeRunner(block_size=2, block_count=17), max_rows=2)
    for request_id in range(6):
        made.add(request_id, request("abcd", n=4, ignore_eos=True))
    ended = []
    while made.has_work():
        ended += [output.request_id for output in made.step()[0] if output.finish]
    assert ended == sorted(ended)


def test_a_big_request_at_the_head_is_not_overtaken():
    made = engine(FakeRunner(block_size=2, block_count=9))
    made.add(1, request("abcdefgh", n=4, ignore_eos=True))
    made.step()
    made.add(2, request("zyxwvutsrqp", n=1))
    made.add(3, request("a", n=1))
    outputs = []
    while made.has_work():
        outputs += [output.request_id for output in made.step()[0] if output.finish]
    assert outputs == [1, 2, 3]


# Blocks


def test_the_second_turn_computes_only_what_is_new():
    runner = FakeRunner(block_size=4, reply=says("0123456789abcdef"))
    made = engine(runner)
    made.add(1, request("x" * 40, n=16))
    finish_all(made)
    before = runner.computed_tokens
    made.add(2, request("x" * 40 + "0123456789abcdef" + "new turn", n=1))
    _, stats = made.step()
    assert stats.cached_tokens == 52  # 40 + 16 - 1 tokens were computed, 13 blocks of them full
    assert runner.computed_tokens - before == 12


@pytest.mark.parametrize(("salts", "cached"), [(("a", "a"), 36), (("a", "b"), 0), (("", "a"), 0)])
def test_tenants_share_no_prefix(salts, cached):
    made = engine(FakeRunner(block_size=4))
    made.add(1, request("x" * 40, n=1, salt=salts[0]))
    finish_all(made)
    made.add(2, request("x" * 40, n=1, salt=salts[1]))
    assert made.step()[1].cached_tokens == cached


def test_prompt_log_probabilities_are_the_same_with_a_warm_cache():
    made = engine(FakeRunner(block_size=4), max_step_tokens=7)
    asked = request("x" * 40, n=1, sampling=SamplingParams(prompt_logprobs=True))
    made.add(1, asked)
    cold = finish_all(made)[1]
    made.add(2, asked)
    assert finish_all(made)[2][0].prompt == cold[0].prompt


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_aborted_request_frees_its_blocks_at_once(steps):
    made = engine(FakeRunner(block_size=4), max_step_tokens=10)
    made.add(1, request("x" * 25, n=10, ignore_eos=True))
    for _ in range(steps):
        made.step()
    assert made.load().blocks_used == -(-min(10 * steps, 25) // 4)
    made.abort(1)
    assert made.load().blocks_used == 0
    assert made.load().waiting == made.load().running == 0
    assert not made.has_work()


def test_a_preempted_request_can_be_aborted():
    made = engine(FakeRunner(block_size=2, block_count=9), prefix_caching=False)
    made.add(1, request("abcd", n=8, ignore_eos=True))
    made.add(2, request("efgh", n=8, ignore_eos=True))
    while not made.step()[1].preempted:
        pass
    made.abort(2)
    assert made.load().waiting == 0
    assert list(finish_all(made)) == [1]


def test_unknown_ids_are_ignored_by_abort():
    made = engine()
    made.abort(7)
    assert not made.has_work()


def test_a_prompt_that_no_pool_can_hold_is_given_up():
    made = engine(FakeRunner(block_size=2, block_count=5))
    made.add(1, request("abcdefghi"))
    made.add(2, request("ab", n=2, ignore_eos=True))
    outputs = finish_all(made)
    assert outputs[1][-1].error == "the request needs more KV cache than the device has"
    assert outputs[2][-1].finish.generated_tokens == 2


def test_a_text_that_outgrows_the_pool_is_given_up():
    made = engine(FakeRunner(block_size=2, block_count=5, reply=says("z" * 30)))
    made.add(1, request("abcd", n=30))
    outputs = finish_all(made)[1]
    assert len(outputs) == 6
    assert "".join(output.text for output in outputs) == "z" * 5
    assert outputs[-1].error is not None
    assert made.load().blocks_used == 0


# Faults


@pytest.mark.parametrize(
    "wrong", [Choice(258, -1.0), Choice(-1, -1.0), Choice(2**40, 0.0), Choice(5, -1.0, [(258, -1.0)]), None]
)
def test_a_wrong_choice_fails_its_request_alone(wrong):
    def spoil(row, choice):
        return wrong if row.sequence_id == 1 and row.position > 3 else choice

    made = engine(FakeRunner(258, reply=says("abcdefgh"), bad_choice=spoil))
    made.add(1, request("xyz"))
    made.add(2, request("xyz"))
    outputs = finish_all(made)
    assert "vocabulary" in outputs[1][-1].error or "no token" in outputs[1][-1].error
    assert outputs[2][-1].finish.text == "abcdefgh"
    assert made.load().blocks_used == 0


def test_a_request_whose_output_cannot_be_made_fails_alone(monkeypatch, caplog):
    made = engine(FakeRunner(258, reply=says("ab☠cd")))
    made.add(1, request("x"))
    made.add(2, request("y", n=1))
    decode = TOKENIZER.decode

    def broken(decoded, **options):
        text = decode(decoded, **options)
        if "☠" in text:
            raise ValueError("/secret/path")
        return text

    monkeypatch.setattr(TOKENIZER, "decode", broken)
    outputs = finish_all(made)
    assert outputs[1][-1].error == "the output could not be made"
    assert outputs[2][-1].finish is not None
    assert "request 1" in caplog.text


def test_an_answer_for_other_rows_counts_as_a_death():
    class Confused(FakeRunner):
        def collect(self):
            super().collect()
            return StepResult(rows=[RowResult(sequence_id=77)])

    made = engine(Confused())
    made.add(1, request("x"))
    with pytest.raises(RunnerDied):
        made.step()


# Device deaths


def survive(made, new_runner, *, deaths=50):
    """Step to the end over device deaths: the outputs by request id, and how many deaths there were."""
    outputs = {}
    died = 0
    while made.has_work():
        try:
            step_outputs, _ = made.step()
        except RunnerDied:
            died += 1
            assert died <= deaths
            step_outputs = made.restart(new_runner())
        for output in step_outputs:
            outputs.setdefault(output.request_id, []).append(output)
    return outputs, died


def test_streams_go_on_over_a_death():
    expected = answer(FakeRunner(), request("abc", n=10, ignore_eos=True))
    runners = [Recording(die_after=4), Recording()]
    made = engine(runners[0])
    made.add(1, request("abc", n=10, ignore_eos=True))
    outputs, died = survive(made, lambda: runners[1])
    assert died == 1
    assert [output.tokens for output in outputs[1]] == [output.tokens for output in expected]
    assert outputs[1][-1].finish.text == expected[-1].finish.text
    known = ids("abc") + [output.tokens[0].id for output in expected[:4]]
    assert runners[1].told[0]["started"] == {1: known}
    assert runners[1].told[0]["finished"] == []


def poisonous(plan):
    return any(POISON in row.token_ids for row in plan.rows)


@pytest.mark.parametrize("poison_at", [0, 7, 30])
def test_a_poisonous_request_is_given_up_and_takes_nobody_with_it(poison_at):
    prompt = [50] * 31
    prompt[poison_at] = POISON
    made = engine(FakeRunner(40, dies_on=poisonous), max_step_tokens=8)
    for request_id in range(5):
        made.add(request_id, request("x", n=30, ignore_eos=True))
    for _ in range(3):
        made.step()
    made.add(5, request(prompt))
    for request_id in range(6, 9):
        made.add(request_id, request("yz", n=30, ignore_eos=True))
    outputs, died = survive(made, lambda: FakeRunner(40, dies_on=poisonous))
    assert died == 3
    assert outputs.pop(5)[-1].error == "the device process died while computing this request"
    assert len(outputs) == 8
    assert all(output[-1].finish.generated_tokens >= 27 for output in outputs.values())


def test_several_poisonous_requests_are_given_up_one_by_one():
    made = engine(FakeRunner(40, dies_on=poisonous))
    for request_id in range(6):
        made.add(request_id, request([POISON] if request_id % 2 else [50], n=20, ignore_eos=True))
    outputs, died = survive(made, lambda: FakeRunner(40, dies_on=poisonous))
    assert died == 5
    assert [request_id for request_id in outputs if outputs[request_id][-1].error] == [1, 3, 5]
    assert all(outputs[request_id][-1].finish for request_id in (0, 2, 4))


def test_deaths_with_tokens_in_between_give_nobody_up():
    made = engine(FakeRunner(die_after=1))
    made.add(1, request("abc", n=10, ignore_eos=True))
    outputs, died = survive(made, lambda: FakeRunner(die_after=1))
    assert died == 9
    assert outputs[1][-1].finish.generated_tokens == 10


def test_a_death_between_steps_is_nobodys_fault():
    made = engine(FakeRunner(), max_step_tokens=10)
    made.add(1, request("abcdefgh" * 40, n=3, ignore_eos=True))
    for _ in range(5):
        made.step()
        assert made.restart(FakeRunner()) == []
    assert finish_all(made)[1][-1].finish is not None


def test_a_request_aborted_after_a_death_gives_no_output():
    made = engine(FakeRunner(die_after=0))
    made.add(1, request("abc"))
    for _ in range(2):
        with pytest.raises(RunnerDied):
            made.step()
        assert made.restart(FakeRunner(die_after=0)) == []
    with pytest.raises(RunnerDied):
        made.step()
    made.abort(1)
    assert made.restart(FakeRunner()) == []
    assert not made.has_work()


def test_the_new_runner_may_be_smaller():
    made = engine(FakeRunner(block_size=4, die_after=5), max_step_tokens=100)
    for request_id in range(4):
        made.add(request_id, request("abcdefgh", n=12, ignore_eos=True))
    outputs, _ = survive(made, lambda: FakeRunner(block_size=3, block_count=12, max_step_tokens=5, max_rows=2))
    assert all(outputs[request_id][-1].finish.generated_tokens == 12 for request_id in range(4))
    assert made.load().blocks_total == 11


def run(engine, *, until=1000):
    """Every output until there is no work."""
    outputs = []
    for _ in range(until):
        if not engine.has_work():
            return outputs
        outputs += engine.step()[0]
    raise AssertionError("it does not come to an end")


def cached_tokens_of(engine, request_id, asked):
    """How much of a request the prefix cache spares."""
    engine.add(request_id, asked)
    cached = 0
    while engine.has_work():
        cached += engine.step()[1].cached_tokens
    return cached


def in_session(asked, name="s", *, expires=math.inf):
    return msgspec.structs.replace(asked, session=Session(name, expires))


def crowd(engine, first_id, *, tokens=60):
    """Requests of nobody's that go through every block."""
    for number in range(first_id, first_id + 8):
        engine.add(number, request([number] * tokens, n=1))
        run(engine)


@pytest.mark.parametrize(("session", "spared"), [(None, 0), (Session("s", math.inf), 12)])
def test_a_sessions_prefix_outlives_a_crowd(session, spared):
    one = engine(FakeRunner(block_count=41), lease_share=0.5)  # 40 blocks of 4 tokens
    first = msgspec.structs.replace(request("a long prompt", n=1), session=session)
    one.add(0, first)
    run(one)
    crowd(one, 1)
    assert cached_tokens_of(one, 100, request("a long prompt")) == spared


def test_what_a_session_keeps_is_given_up_before_anybody_waits():
    one = engine(FakeRunner(block_count=41), lease_share=1.0)
    for number in range(4):
        one.add(number, in_session(request([number + 2] * 36, n=1), f"s{number}"))
        run(one)
    assert one._scheduler.blocks._allocator.leased == 36
    one.add(10, request([99] * 150, n=4))
    outputs = run(one)
    assert outputs[-1].finish.reason is FinishReason.LENGTH
    assert one.load().blocks_used == 0


def test_a_closed_session_keeps_nothing_even_of_what_still_runs():
    one = engine(FakeRunner(block_count=41))
    one.add(0, in_session(request("a long prompt", n=3)))
    one.step()
    one.end_session(("", "s"))
    run(one)
    assert one._scheduler.blocks._allocator.leased == 0


def test_a_tenant_cannot_end_or_replace_anothers_session():
    one = engine(FakeRunner(block_count=41))
    one.add(0, in_session(request("a long prompt", n=1, salt="mine")))
    run(one)
    one.end_session(("theirs", "s"))
    one.add(1, in_session(request("another long prompt", n=1, salt="theirs")))
    run(one)
    assert one._scheduler.blocks._allocator.leased == 3 + 4


def test_a_session_that_is_over_keeps_nothing():
    one = engine(FakeRunner(block_count=41))
    one.add(0, in_session(request("a long prompt", n=1), expires=time.monotonic() - 1))
    run(one)
    assert one._scheduler.blocks._allocator.leased == 0
    one.add(1, in_session(request("a long prompt", n=1), expires=time.monotonic() + 0.5))
    run(one)
    assert one._scheduler.blocks._allocator.leased == 3
    time.sleep(0.6)
    one.add(2, request("x", n=1))
    run(one)
    assert one._scheduler.blocks._allocator.leased == 0


def test_an_answer_is_cut_at_its_deadline_with_what_is_there():
    one = engine(FakeRunner(reply=says("abcdefgh"), delay_s=0.01))
    one.add(0, msgspec.structs.replace(request("x", n=500), deadline=time.monotonic() + 0.05))
    outputs = run(one)
    finish = outputs[-1].finish
    assert (finish.reason, finish.cut) == (FinishReason.LENGTH, True)
    assert 1 <= finish.generated_tokens < 500
    assert finish.text == "".join(output.text for output in outputs)
    assert outputs[-1].tokens, "the token that came at the deadline is given"
    assert one.load().blocks_used == 0


def test_held_back_text_is_shown_when_an_answer_is_cut():
    one = engine(FakeRunner(reply=says("one two")))
    one.add(0, msgspec.structs.replace(request("x", n=500, stop_strings=("one two three",), keep_stop_text=False)))
    for _ in range(7):
        assert all(output.text == "" for output in one.step()[0])
    one._sequences[0].request = msgspec.structs.replace(one._sequences[0].request, deadline=0.0)
    [output] = one.step()[0]
    assert output.finish.text.startswith("one two")


def test_who_never_came_to_a_token_is_told_at_the_deadline():
    one = engine(FakeRunner(), max_rows=1)
    one.add(0, request("first", n=3))
    one.add(1, msgspec.structs.replace(request("second"), deadline=time.monotonic()))
    outputs = {output.request_id: output for output in one.step()[0]}
    cut = outputs[1]
    assert (cut.tokens, cut.finish.generated_tokens, cut.finish.cut) == ([], 0, True)
    assert cut.first is not None
    assert [output.request_id for output in run(one)] == [0, 0]


def test_a_prompt_still_being_computed_is_cut_too():
    one = engine(FakeRunner(), max_step_tokens=4)
    one.add(0, msgspec.structs.replace(request("a very long prompt"), deadline=time.monotonic()))
    [output] = one.step()[0]
    assert (output.tokens, output.finish.cut) == ([], True)
    assert not one.has_work()
    assert one.load().blocks_used == 0


def test_an_end_before_the_deadline_is_no_cut():
    one = engine(FakeRunner(reply=says("ab", end=[EOS])))
    one.add(0, msgspec.structs.replace(request("x"), deadline=time.monotonic() + 60))
    finish = run(one)[-1].finish
    assert (finish.reason, finish.cut) == (FinishReason.EOS_TOKEN, False)
