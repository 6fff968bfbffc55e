"""LoRA adapters in the engine: when the device gets them, when it may forget them, and what happens when it dies."""

import pytest
from fakes import FakeRunner, byte_tokenizer

from serving.engine.engine import Engine
from serving.errors import AdapterRefused, NoRoomForAdapter, RunnerDied
from serving.protocol import Request, SamplingParams, StopParams


class Recording(FakeRunner):
    """Keeps the plans' adapters: (loaded, dropped, rows)."""

    def __init__(self, **options):
        super().__init__(**options)
        self.told = []

    def submit(self, plan):
        self.told.append(([each.number for each in plan.adapters], list(plan.dropped), len(plan.rows)))
        super().submit(plan)


def request(adapter=0, *, n=4, prompt=(5, 6, 7, 8, 9, 10, 11, 12, 13), salt=""):
    return Request(
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=n, ignore_eos=True),
        adapter=adapter,
        cache_salt=salt,
    )


def engine(runner=None, *, max_adapters=2, **options):
    return Engine(
        runner or FakeRunner(),
        byte_tokenizer(),
        eos_token_ids=frozenset(),
        max_step_tokens=512,
        max_rows=8,
        max_adapters=max_adapters,
        **options,
    )


def finish_all(made):
    outputs = {}
    while made.has_work():
        for output in made.step()[0]:
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs):
    return [token.id for output in outputs for token in output.tokens]


def test_a_request_is_computed_with_its_adapter():
    made = engine()
    made.load_adapter(1, "/fr")
    made.load_adapter(2, "/de")
    for number in (0, 1, 2):
        made.add(number, request(number))
    together = {number: tokens(outputs) for number, outputs in finish_all(made).items()}
    assert len({tuple(each) for each in together.values()}) == 3
    for number in (0, 1, 2):
        alone = engine(prefix_caching=False)
        alone.load_adapter(1, "/fr")
        alone.load_adapter(2, "/de")
        alone.add(0, request(number))
        assert tokens(finish_all(alone)[0]) == together[number]


def test_what_one_adapter_computed_is_no_prefix_of_anothers():
    made = engine()
    made.load_adapter(1, "/fr")
    cached = []
    for number, adapter in enumerate((0, 1, 0, 1)):
        made.add(number, request(adapter))
        cached.append(made.step()[1].cached_tokens)
        finish_all(made)
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) > 0


def test_an_adapter_is_loaded_between_steps_and_running_requests_go_on():
    runner = Recording()
    made = engine(runner)
    made.add(1, request(n=6))
    made.step()
    made.load_adapter(1, "/fr")
    made.add(2, request(1, n=3))
    outputs = finish_all(made)
    assert runner.told[:3] == [([], [], 1), ([1], [], 0), ([], [], 2)]
    assert [len(tokens(outputs[number])) for number in (1, 2)] == [5, 3]


def test_what_the_device_refuses_is_an_error_and_takes_no_place():
    made = engine(FakeRunner(refuses=lambda directory: "another rank" if directory == "/bad" else None), max_adapters=1)
    with pytest.raises(AdapterRefused, match="another rank"):
        made.load_adapter(1, "/bad")
    assert not made.has_adapter(1)
    made.load_adapter(2, "/good")
    assert made.has_adapter(2)


def test_beyond_the_room_none_is_loaded():
    made = engine(max_adapters=1)
    made.load_adapter(1, "/fr")
    with pytest.raises(NoRoomForAdapter):
        made.load_adapter(2, "/de")
    with pytest.raises(NoRoomForAdapter):
        engine(max_adapters=0).load_adapter(1, "/fr")


def test_a_running_request_keeps_an_adapter_that_goes_and_the_device_forgets_it_afterwards():
    runner = Recording(max_adapters=1)
    made = engine(runner, max_adapters=1)
    made.load_adapter(1, "/fr")
    made.add(1, request(1, n=3))
    made.add(2, request(n=6))
    made.step()
    made.drop_adapter(1)
    with pytest.raises(NoRoomForAdapter, match="that requests still use"):
        made.load_adapter(2, "/de")
    outputs = finish_all(made)
    assert len(tokens(outputs[1])) == 2
    assert [dropped for _, dropped, _ in runner.told] == [[], [], [], [], [1], [], []]
    assert runner.adapters == {}


def test_one_that_nobody_uses_makes_room_for_the_next_in_the_same_plan():
    runner = Recording(max_adapters=1)
    made = engine(runner, max_adapters=1)
    made.load_adapter(1, "/fr")
    made.add(1, request(1))
    finish_all(made)
    made.drop_adapter(1)
    made.load_adapter(2, "/de")
    assert runner.told[-1] == ([2], [1], 0)
    assert runner.rows == {}, "its sequences were forgotten first"


def test_a_preempted_request_keeps_its_adapter():
    made = engine(FakeRunner(block_count=9), max_adapters=1)
    made.load_adapter(1, "/fr")
    for number in (1, 2):
        made.add(number, request(1, n=12, salt=str(number)))
    made.step()
    made.drop_adapter(1)
    preempted, made_tokens = 0, 0
    while made.has_work():
        outputs, stats = made.step()
        preempted += stats.preempted
        made_tokens += len(tokens(outputs))
    assert (preempted > 0, made_tokens) == (True, 22)


@pytest.mark.parametrize("adapter", [1, 2])
def test_a_request_for_one_that_is_gone_or_never_was_fails_alone(adapter):
    made = engine()
    made.load_adapter(1, "/fr")
    made.drop_adapter(1)
    made.add(1, request(adapter))
    made.add(2, request())
    outputs = finish_all(made)
    assert [output.error for output in outputs[1]] == ["its adapter was unloaded"]
    assert len(tokens(outputs[2])) == 4


def test_such_a_request_can_be_aborted():
    made = engine()
    made.add(1, request(7))
    assert made.has_work()
    made.abort(1)
    assert not made.has_work()


def test_a_new_device_gets_every_adapter_that_is_used_or_may_be():
    made = engine(max_adapters=3)
    for number, directory in enumerate(("/fr", "/de", "/it"), 1):
        made.load_adapter(number, directory)
    made.add(1, request(1, n=6))
    made.add(2, request(2, n=6))
    before = {output.request_id: tokens([output]) for output in made.step()[0]}
    made.drop_adapter(1)
    made.drop_adapter(3)
    runner = Recording()
    assert made.restart(runner) == []
    assert runner.adapters == {1: "/fr", 2: "/de"}
    after = {number: tokens(outputs) for number, outputs in finish_all(made).items()}
    for number, directory in ((1, "/fr"), (2, "/de")):
        alone = engine()
        alone.load_adapter(9, directory)
        alone.add(0, request(9, n=6))
        assert before[number] + after[number] == tokens(finish_all(alone)[0])
    assert made.take_lost_adapters() == {}


def test_the_requests_of_one_that_a_new_device_refuses_fail_and_others_go_on():
    made = engine()
    made.load_adapter(1, "/fr")
    made.load_adapter(2, "/de")
    made.add(1, request(1))
    made.add(2, request(2))
    made.step()
    outputs = made.restart(FakeRunner(refuses=lambda directory: "it changed" if directory == "/fr" else None))
    assert [(output.request_id, output.error) for output in outputs] == [(1, "its adapter could not be loaded again")]
    assert made.take_lost_adapters() == {1: "it changed"}
    assert made.take_lost_adapters() == {}
    assert not made.has_adapter(1)
    assert len(tokens(finish_all(made)[2])) == 3


def poisonous(plan):
    return any(adapter.directory == "/poison" for adapter in plan.adapters)


def test_one_that_kills_the_device_twice_is_given_up_and_nothing_else_is():
    made = engine(FakeRunner(dies_on=poisonous), max_adapters=3)
    made.load_adapter(1, "/fr")
    made.add(1, request(1))
    first = made.step()[0]
    with pytest.raises(RunnerDied):
        made.load_adapter(2, "/poison")
    with pytest.raises(RunnerDied):
        made.restart(FakeRunner(dies_on=poisonous))
    assert made.restart(FakeRunner(dies_on=poisonous)) == []
    assert made.take_lost_adapters() == {2: "the device process died while it was loaded"}
    assert not made.has_adapter(2)
    assert len(tokens(first)) + len(tokens(finish_all(made)[1])) == 4


def test_a_death_of_other_causes_costs_no_adapter():
    unlucky = FakeRunner()
    made = engine(unlucky)
    unlucky.kill()
    with pytest.raises(RunnerDied):
        made.load_adapter(1, "/fr")
    assert made.restart(FakeRunner()) == []
    assert made.has_adapter(1)
    made.add(1, request(1))
    assert len(tokens(finish_all(made)[1])) == 4


def test_outputs_of_a_restart_that_fails_come_with_the_next():
    made = engine(FakeRunner(), max_adapters=2)
    made.load_adapter(1, "/fr")
    made.load_adapter(2, "/poison")
    made.add(1, request(2))
    for _ in range(2):
        with pytest.raises(RunnerDied):
            made.restart(FakeRunner(dies_on=poisonous))
    (output,) = made.restart(FakeRunner(dies_on=poisonous))
    assert (output.request_id, output.error) == (1, "its adapter could not be loaded again")
    assert made.has_adapter(1)
