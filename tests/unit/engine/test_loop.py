import queue
import threading
import time

import msgspec
import pytest
from fakes import FakeRunner, byte_tokenizer

from serving.engine import loop
from serving.engine.engine import Engine
from serving.engine.loop import Abort, DropAdapter, EngineLoop, LoadAdapter, Stop, Submit
from serving.errors import ConfigurationError, RunnerDied
from serving.protocol import Request, SamplingParams, StopParams

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(loop, "IDLE_SLICE_S", 0.01)


def request(n=5, prompt=(5, 6, 7)):
    return Request(
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=n, ignore_eos=True),
    )


class Harness:
    """An EngineLoop with all that it calls recorded."""

    def __init__(self, runner, *, next_runner=FakeRunner, on_output=None):
        self.inbox = queue.SimpleQueue()
        self.outputs = []
        self.stats = []
        self.states = []
        self.runners = [runner]
        self._on_output = on_output
        engine = Engine(runner, TOKENIZER, eos_token_ids=frozenset(), max_step_tokens=64, max_rows=8, max_adapters=2)
        self._next_runner = next_runner
        self.adapters = []
        self.loop = EngineLoop(
            engine, self.inbox, self.publish, self.start_runner, self.states.append,
            lambda number, error: self.adapters.append((number, error and str(error))),
        )  # fmt: skip

    def publish(self, outputs, stats):
        self.outputs += outputs
        self.stats.append(stats)
        for output in outputs:
            if self._on_output:
                self._on_output(self, output)

    def start_runner(self):
        self.runners.append(self._next_runner())
        return self.runners[-1]

    def run(self):
        """Run in another thread, as in life, and wait for the end; what it raised is raised here."""
        raised = []

        def body():
            try:
                self.loop.run()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
        if raised:
            raise raised[0]

    def tokens(self, request_id):
        return [token.id for output in self.outputs if output.request_id == request_id for token in output.tokens]


def stop_when(count):
    """Stop when so many requests have ended."""

    def on_output(harness, output):
        ended = sum(1 for made in harness.outputs if made.finish or made.error)
        if ended >= count and (output.finish or output.error):
            harness.inbox.put(Stop())

    return on_output


def test_requests_are_served_until_stop():
    harness = Harness(FakeRunner(), on_output=stop_when(3))
    for request_id in range(3):
        harness.inbox.put(Submit(request_id, request()))
    harness.run()
    assert all(len(harness.tokens(request_id)) == 5 for request_id in range(3))
    assert harness.loop.steps == len(harness.stats) == 5
    assert harness.states == []


def test_stop_ends_an_idle_loop():
    harness = Harness(FakeRunner())
    harness.inbox.put(Stop())
    harness.run()
    assert harness.outputs == []


def test_stop_ends_a_busy_loop_with_the_step_under_way():
    harness = Harness(FakeRunner(), on_output=lambda harness, output: harness.inbox.put(Stop()))
    harness.inbox.put(Submit(1, request(n=1000)))
    harness.run()
    assert len(harness.tokens(1)) == 2


def test_an_abort_takes_effect_at_the_end_of_the_step_under_way():
    def on_output(harness, output):
        if output.request_id == 1 and len(harness.tokens(1)) == 3:
            harness.inbox.put(Abort(1))
            harness.inbox.put(Submit(2, request(n=2)))
        if output.finish:
            harness.inbox.put(Stop())

    harness = Harness(FakeRunner(), on_output=on_output)
    harness.inbox.put(Submit(1, request(n=1000)))
    harness.run()
    assert len(harness.tokens(1)) == 4
    assert len(harness.tokens(2)) == 2
    assert list(harness.runners[0].rows) == [2]


def test_the_abort_of_the_last_request_is_seen_in_the_numbers():
    def leave(harness, output):
        harness.inbox.put(Abort(1))
        threading.Timer(0.05, harness.inbox.put, [Stop()]).start()

    harness = Harness(FakeRunner(), on_output=leave)
    harness.inbox.put(Submit(1, request(n=1000)))
    harness.run()
    assert (harness.stats[0].running, harness.stats[-1].running) == (1, 0)
    assert (harness.stats[-1].blocks_used, harness.stats[-1].rows) == (0, 0)


def test_a_death_in_a_step_is_mended_and_told():
    quiet = Harness(FakeRunner(), on_output=stop_when(1))
    quiet.inbox.put(Submit(1, request(n=10)))
    quiet.run()
    harness = Harness(FakeRunner(die_after=3), on_output=stop_when(1))
    harness.inbox.put(Submit(1, request(n=10)))
    harness.run()
    assert harness.tokens(1) == quiet.tokens(1)
    assert harness.states == [False, True]
    assert harness.runners[0].closed
    assert not harness.runners[1].closed


def test_a_death_while_idle_is_mended_without_a_request():
    runner = FakeRunner()
    runner.kill()

    def start():
        harness.inbox.put(Stop())
        return FakeRunner()

    harness = Harness(runner, next_runner=start)
    harness.run()
    assert harness.states == [False, True]
    assert harness.stats[-1].rows == 0


def test_a_poisonous_request_gets_its_error_published():
    def dies_on(plan):
        return any(99 in row.token_ids for row in plan.rows)

    harness = Harness(
        FakeRunner(90, dies_on=dies_on), next_runner=lambda: FakeRunner(90, dies_on=dies_on), on_output=stop_when(2)
    )
    harness.inbox.put(Submit(1, request(prompt=[99])))
    harness.inbox.put(Submit(2, request()))
    harness.run()
    assert [output.request_id for output in harness.outputs if output.error] == [1]
    assert len(harness.tokens(2)) == 5


def test_a_runner_that_cannot_be_started_ends_the_loop():
    def fail():
        raise ConfigurationError("no memory")

    harness = Harness(FakeRunner(die_after=0), next_runner=fail)
    harness.inbox.put(Submit(1, request()))
    with pytest.raises(ConfigurationError):
        harness.run()
    assert harness.states == [False]


def test_a_device_that_keeps_dying_idle_ends_the_loop():
    def dead():
        runner = FakeRunner()
        runner.kill()
        return runner

    harness = Harness(dead(), next_runner=dead)
    with pytest.raises(RunnerDied):
        harness.run()


def test_progress_can_be_read_from_outside():
    harness = Harness(FakeRunner())
    thread = threading.Thread(target=harness.loop.run)
    thread.start()
    try:
        seen = harness.loop.last_progress
        deadline = time.monotonic() + 10
        while harness.loop.last_progress == seen and time.monotonic() < deadline:
            time.sleep(0.005)
        assert harness.loop.last_progress > seen
        assert not harness.loop.busy
        harness.inbox.put(Submit(1, request(n=10**6)))
        while not harness.loop.steps and time.monotonic() < deadline:
            time.sleep(0.005)
        assert harness.loop.busy
    finally:
        harness.inbox.put(Stop())
        thread.join(timeout=10)
    assert not thread.is_alive()


def test_adapters_come_between_steps_and_are_told():
    def on_output(harness, output):
        if len(harness.tokens(1)) == 3:
            harness.inbox.put(LoadAdapter(1, "/fr"))
            harness.inbox.put(LoadAdapter(2, "/bad"))
            harness.inbox.put(Submit(2, adapted(1)))
        if output.request_id == 2 and output.finish:
            harness.inbox.put(DropAdapter(1))
            harness.inbox.put(Submit(3, adapted(1)))
        if output.error:
            harness.inbox.put(Stop())

    refuses = {"/bad": "another base"}.get
    harness = Harness(FakeRunner(refuses=refuses), on_output=on_output)
    harness.inbox.put(Submit(1, request(n=1000)))
    harness.run()
    assert harness.adapters == [(1, None), (2, "The adapter cannot be loaded: another base")]
    assert len(harness.tokens(2)) == 5
    assert [output.request_id for output in harness.outputs if output.error] == [3]


def adapted(number):
    return msgspec.structs.replace(request(), adapter=number)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_device_that_dies_over_an_adapter_is_started_again_and_asked_once_more(deaths):
    left = [True] * deaths

    def dies_on(plan):
        return bool(plan.adapters) and bool(left) and left.pop()

    def next_runner():
        return FakeRunner(dies_on=dies_on)

    harness = Harness(FakeRunner(dies_on=dies_on), next_runner=next_runner, on_output=stop_when(1))
    harness.inbox.put(LoadAdapter(1, "/fr"))
    harness.inbox.put(Submit(1, request()))
    harness.run()
    told = {1: None, 2: "The adapter cannot be loaded: the device process died while it was loaded"}[deaths]
    assert harness.adapters == [(1, told)]
    assert harness.states == [False, True]
    assert [runner.closed for runner in harness.runners] == [True] * deaths + [False]
    assert len(harness.tokens(1)) == 5


def test_an_adapter_that_a_new_device_refuses_is_told_of():
    def refuses(directory):
        return "its files changed"

    harness = Harness(FakeRunner(die_after=3), next_runner=lambda: FakeRunner(refuses=refuses), on_output=stop_when(2))
    harness.inbox.put(LoadAdapter(1, "/fr"))
    harness.inbox.put(Submit(1, adapted(1)))
    harness.inbox.put(Submit(2, request()))
    harness.run()
    assert harness.adapters == [(1, None), (1, "The adapter cannot be loaded: its files changed")]
    assert [output.error for output in harness.outputs if output.request_id == 1][-1] == (
        "its adapter could not be loaded again"
    )
    assert len(harness.tokens(2)) == 5


def test_tokens_do_not_wait_for_an_adapter():
    order = []

    class Slow(FakeRunner):
        def submit(self, plan):
            if plan.adapters:
                order.append("load")
            super().submit(plan)

    def on_output(harness, output):
        order.append(len(harness.tokens(1)))
        if output.finish:
            harness.inbox.put(Stop())
        if len(harness.tokens(1)) == 2:
            harness.inbox.put(LoadAdapter(1, "/fr"))

    harness = Harness(Slow(), on_output=on_output)
    harness.inbox.put(Submit(1, request()))
    harness.run()
    assert order == [1, 2, 3, "load", 4, 5]
