"""The bridge: real engine thread, real gevent hub, fake device."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import gevent
import pytest
from fakes import FakeRunner, byte_tokenizer
from gevent import socket as green_socket

from serving.bridge import Bridge, Permit, State
from serving.engine.engine import Engine
from serving.errors import ClientGone, GenerationError, ModelError, NotReady, Overloaded, ShuttingDown
from serving.plan import Runner
from serving.protocol import FinishReason, Request, RequestOutput, SamplingParams, StepStats, StopParams


def request(tokens: int = 8, prompt: str = "hello") -> Request:
    return Request(
        prompt_token_ids=[byte + 2 for byte in prompt.encode()],
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=tokens, ignore_eos=True),
    )


class House:
    """A bridge over fake devices, with what the test wants to see of it."""

    def __init__(
        self, *runners: FakeRunner, before: Callable[[], None] = lambda: None, max_rows: int = 64, **options
    ) -> None:
        self.max_rows = max_rows
        self.runners = list(runners) or [FakeRunner(vocab_size=258)]
        self.left = iter(self.runners)
        self.before = before
        self.before_runner: Callable[[], object] = lambda: None
        self.steps: list[StepStats] = []
        self.bridge: Bridge[str] = Bridge(self.start, on_step=self.steps.append, **{"permits": 4, **options})

    def start(self) -> tuple[Engine, Callable[[], Runner], str]:
        self.before()
        engine = Engine(
            self.start_runner(),
            byte_tokenizer(),
            eos_token_ids=frozenset({0}),
            max_step_tokens=512,
            max_rows=self.max_rows,
            max_adapters=2,
        )
        return engine, self.start_runner, "loaded"

    def start_runner(self) -> Runner:
        self.before_runner()
        runner = next(self.left, None)
        if runner is None:
            raise ModelError("no device is left")
        return runner

    def wait(self, state: State = State.READY) -> "Bridge[str]":
        wait_until(lambda: self.bridge.state is state)
        return self.bridge


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    with gevent.Timeout(seconds):
        while not true():
            gevent.sleep(0.002)


@pytest.fixture
def build() -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def make(*runners: FakeRunner, **options) -> House:
        houses.append(House(*runners, **options))
        return houses[-1]

    yield make
    for house in houses:
        house.bridge.close()
    wait_until(lambda: not any(t.name == "engine" for t in threading.enumerate()))


def slow(**options) -> FakeRunner:
    return FakeRunner(vocab_size=258, **{"delay_s": 0.01, **options})


def words(stream) -> list[RequestOutput]:
    return [output for output in stream if output is not None]


def test_outputs_arrive_in_order_and_end_with_the_finish(build):
    bridge = build().wait()
    outputs = words(bridge.submit(request(20)))
    assert sum(len(output.tokens) for output in outputs) == 20
    assert [output.finish is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].finish.reason is FinishReason.LENGTH
    assert bridge.open_requests == 0


def test_streams_are_served_together(build):
    house = build(slow())
    bridge = house.wait()
    streams = [gevent.spawn(words, bridge.submit(request(10, prompt))) for prompt in ("a", "bc", "def")]
    gevent.joinall(streams, raise_error=True)
    assert max(step.rows for step in house.steps) == 3
    assert sum(len(output.tokens) for stream in streams for output in stream.value) == 30


def submit_all(bridge, *requests, client=None):
    permits = [bridge.permit() for _ in requests]
    return bridge.submit_all(requests, client, permits)


def test_requests_of_one_answer_share_a_stream_and_none_waits_for_another(build):
    house = build(slow(max_rows=1), max_rows=1)
    stream = submit_all(house.wait(), request(3, "a"), request(2, "b"), request(4, "c"))
    outputs = words(stream)
    first, second, third = stream.numbers
    assert [output.request_id for output in outputs] == [first] * 3 + [second] * 2 + [third] * 4
    assert house.bridge.open_requests == 0


def test_a_request_that_is_done_gives_its_permit_back_before_its_siblings_are(build):
    bridge = build(slow()).wait()
    stream = submit_all(bridge, request(50, "a"), request(2, "b"))
    for output in stream:
        if output is not None and output.finish is not None:
            assert bridge.open_requests == 1, "the last one's stays until its last output is dealt with"
    assert bridge.open_requests == 0


def test_closing_a_shared_stream_aborts_all_of_it(build):
    house = build(slow())
    bridge = house.wait()
    stream = submit_all(bridge, request(1000, "a"), request(1000, "b"))
    outputs = iter(stream)
    next(outputs)
    outputs.close()
    assert bridge.open_requests == 0
    wait_until(lambda: house.steps[-1].running == 0 or not bridge._engine_loop.busy)
    words(bridge.submit(request(1)))
    assert len(house.runners[0].rows) == 1


def test_a_client_that_is_gone_ends_the_whole_of_a_shared_stream(build):
    bridge = build(slow()).wait()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = submit_all(bridge, request(1000, "a"), request(2, "b"), client=ours)
        gevent.spawn_later(0.1, theirs.close)
        with pytest.raises(ClientGone):
            words(stream)
    assert bridge.open_requests == 0


def test_a_shared_stream_is_handed_over_whole_or_not_at_all(build):
    bridge = build().wait()
    permits = [bridge.permit(), bridge.permit()]
    bridge.release(permits[1].number)
    with pytest.raises(NotReady):
        bridge.submit_all([request(), request()], None, permits)
    assert not permits[0].handed_over
    permits[0].close()
    assert bridge.open_requests == 0


def test_until_the_model_is_loaded_nothing_is_taken_and_the_hub_turns(build):
    gate = threading.Event()
    house = build(before=gate.wait)
    bridge = house.bridge
    gevent.sleep(0.05)
    assert bridge.state is State.LOADING
    assert not bridge.healthy()
    for call in (bridge.loaded, bridge.permit, lambda: bridge.submit(request()), lambda: bridge.load_adapter(1, "/a")):
        with pytest.raises(NotReady):
            call()
    gate.set()
    house.wait()
    assert bridge.loaded() == "loaded"
    assert bridge.healthy()


def test_a_model_that_cannot_be_loaded_is_told_and_nothing_is_taken(build):
    def refuse():
        raise ModelError("config.json is missing")

    bridge = build(before=refuse).wait(State.FAILED)
    assert str(bridge.failure) == "config.json is missing"
    assert not bridge.healthy()
    with pytest.raises(NotReady):
        bridge.submit(request())


def test_beyond_the_permits_a_request_is_refused_with_a_time_to_come_back(build):
    house = build(slow(), permits=2)
    bridge = house.wait()
    streams = [bridge.submit(request(1000)), bridge.submit(request(1000))]
    with pytest.raises(Overloaded) as refused:
        bridge.submit(request())
    assert 1 <= refused.value.retry_after_s <= 60
    streams.pop().close()
    words(bridge.submit(request(2)))


def test_the_time_to_come_back_follows_service_time_and_queue(build):
    bridge = build(slow(max_rows=1), permits=3).wait()
    words(bridge.submit(request(150)))  # one request takes more than 1.5 s
    streams = [bridge.submit(request(100)) for _ in range(3)]
    gevent.sleep(0.1)  # one is served, two wait
    with pytest.raises(Overloaded) as refused:
        bridge.permit()
    assert 4 <= refused.value.retry_after_s <= 20
    assert len(streams) == 3


def test_a_permit_counts_from_the_moment_it_is_taken_until_it_is_given_back(build):
    bridge = build(permits=1).wait()
    with bridge.permit(), pytest.raises(Overloaded):
        bridge.permit()
    with bridge.permit() as permit:
        stream = bridge.submit(request(2), permit=permit)
    assert bridge.open_requests == 1, "the stream holds it after the block"
    words(stream)
    assert bridge.open_requests == 0


def hold(bridge) -> None:
    with bridge.permit():
        gevent.sleep(0.002)


def drop(stream) -> None:
    pass


def close_twice(stream) -> None:
    stream.close()
    stream.close()


def leave(stream) -> None:
    next(iter(stream))


def close_while_reading(stream) -> None:
    for _ in stream:
        gevent.spawn(stream.close)


def fail(stream) -> None:
    for _ in stream:
        raise gevent.GreenletExit


@pytest.mark.parametrize("seed", range(4))
def test_permits_come_back_exactly_once_however_streams_end(build, seed):
    """Finished, closed early, closed twice, never read, dropped, broken out of, killed: the count is whole again."""
    chance = random.Random(seed)
    bridge = build(slow(delay_s=0.001), permits=8).wait()

    def use() -> None:
        with contextlib.suppress(Overloaded):
            way = chance.choice([hold, drop, close_twice, leave, close_while_reading, fail, words])
            way(bridge if way is hold else bridge.submit(request(chance.randrange(1, 30))))

    greenlets = []
    for _ in range(120):
        greenlets.append(gevent.spawn(use))
        assert 0 <= bridge.open_requests <= 8
        if chance.random() < 0.2:
            chance.choice(greenlets).kill(block=False)
        gevent.sleep(0.001)
    gevent.joinall(greenlets)
    wait_until(lambda: bridge.open_requests == 0)
    streams = [bridge.submit(request(2)) for _ in range(8)]
    with pytest.raises(Overloaded):
        bridge.permit()
    for stream in streams:
        words(stream)


def test_a_permit_that_is_lost_comes_back(build):
    bridge = build(permits=1).wait()
    permit: Permit | None = bridge.permit()
    assert permit is not None
    permit = None
    wait_until(lambda: bridge.open_requests == 0)


def test_closing_a_stream_frees_the_engine_within_a_step(build):
    house = build(slow())
    bridge = house.wait()
    other = bridge.submit(request(1000))
    stream = bridge.submit(request(1000))
    wait_until(lambda: bool(house.steps) and house.steps[-1].running == 2)
    stream.close()
    seen = len(house.steps)
    wait_until(lambda: len(house.steps) >= seen + 2)
    assert house.steps[-1].running == 1
    other.close()


def test_a_silent_stream_yields_a_keep_alive(build):
    bridge = build(slow(delay_s=0.25), keep_alive_s=0.05).wait()
    outputs = list(bridge.submit(request(2)))
    assert outputs.count(None) >= 4
    assert outputs[-1].finish is not None


@contextlib.contextmanager
def connection() -> Iterator[tuple[green_socket.socket, socket.socket]]:
    """(the server's end as gunicorn holds it, the client's)."""
    ours, theirs = socket.socketpair()
    green = green_socket.socket(ours.family, ours.type, fileno=ours.detach())
    with green, theirs:
        yield green, theirs


def test_a_client_that_hangs_up_ends_its_request(build):
    house = build(slow())
    bridge = house.wait()
    with connection() as (ours, theirs):
        stream = bridge.submit(request(1000), client=ours)
        reader = gevent.spawn(words, stream)
        gevent.sleep(0.05)
        theirs.close()
        reader.join(timeout=2)
        assert isinstance(reader.exception, ClientGone)
        assert bridge.open_requests == 0


def test_a_client_that_hangs_up_frees_the_engine_even_if_nobody_reads_the_stream(build):
    house = build(slow())
    bridge = house.wait()
    with connection() as (ours, theirs):
        stream = bridge.submit(request(1000), client=ours)
        other = bridge.submit(request(1000))
        wait_until(lambda: bool(house.steps) and house.steps[-1].running == 2)
        theirs.close()
        wait_until(lambda: house.steps[-1].running == 1)
        with pytest.raises(ClientGone):
            words(stream)
        other.close()


def test_a_client_that_was_gone_before_is_noticed(build):
    bridge = build(slow()).wait()
    with connection() as (ours, theirs):
        theirs.close()
        with pytest.raises(ClientGone):
            words(bridge.submit(request(1000), client=ours))
        ours.close()
        with pytest.raises(ClientGone):
            words(bridge.submit(request(1000), client=ours))
    assert bridge.open_requests == 0


def test_pipelined_bytes_end_the_watch_and_stay_readable(build):
    bridge = build(slow()).wait()
    with connection() as (ours, theirs):
        stream = bridge.submit(request(20), client=ours)
        theirs.sendall(b"GET /next")
        outputs = words(stream)
        assert outputs[-1].finish is not None
        assert ours.recv(100) == b"GET /next"


def test_the_watch_leaves_the_connection_fit_for_its_next_request(build):
    bridge = build(slow(delay_s=0.001)).wait()
    with connection() as (ours, theirs):
        for _ in range(3):
            words(bridge.submit(request(5), client=ours))
            reader = gevent.spawn(ours.recv, 100)
            gevent.sleep(0.01)
            theirs.sendall(b"more")
            assert reader.get(timeout=2) == b"more"


def test_the_watch_disturbs_no_sending(build):
    bridge = build(slow()).wait()
    with connection() as (ours, theirs):
        stream = bridge.submit(request(5), client=ours)
        for output in stream:
            if output is not None:
                ours.sendall(b"x")
        assert theirs.recv(100) == b"x" * 5


def test_offload_gives_back_results_and_exceptions_while_the_hub_turns(build, capfd):
    bridge = build().wait()
    turned = 0

    def turn() -> None:
        nonlocal turned
        while True:
            turned += 1
            gevent.sleep(0.005)

    turning = gevent.spawn(turn)
    assert bridge.offload(lambda a, b: time.sleep(0.1) or a + b, 1, b=2) == 3
    assert turned > 5
    turning.kill()
    with pytest.raises(ZeroDivisionError):
        bridge.offload(lambda: 1 // 0)
    assert capfd.readouterr().err == "", "an expected exception is not printed"


def test_offload_uses_no_more_threads_than_allowed(build):
    bridge = build(offload_threads=2).wait()
    running, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    gevent.joinall([gevent.spawn(bridge.offload, work) for _ in range(6)], raise_error=True)
    assert most == 2


def test_what_is_quick_does_not_wait_behind_what_is_long(build):
    bridge = build(offload_threads=2).wait()
    gate = threading.Event()
    long = [gevent.spawn(bridge.offload_long, gate.wait) for _ in range(6)]
    gevent.sleep(0.05)
    assert bridge.offload(lambda: "done") == "done"
    assert not any(greenlet.ready() for greenlet in long)
    gate.set()
    gevent.joinall(long, raise_error=True)


def test_a_dead_device_is_replaced_and_the_same_stream_goes_on(build):
    calm = build(FakeRunner(vocab_size=258)).wait()
    expected = words(calm.submit(request(30)))[-1].finish.text
    gate = threading.Event()
    house = build(FakeRunner(vocab_size=258, die_after=10), FakeRunner(vocab_size=258))
    bridge = house.wait()
    house.before_runner = gate.wait
    reader = gevent.spawn(words, bridge.submit(request(30)))
    house.wait(State.RECOVERING)
    assert not bridge.healthy()
    with pytest.raises(NotReady):
        bridge.submit(request())
    gate.set()
    assert reader.get(timeout=10)[-1].finish.text == expected
    assert bridge.state is State.READY


def test_a_device_that_cannot_be_replaced_ends_streams_and_server(build):
    house = build(FakeRunner(vocab_size=258, die_after=5))
    bridge = house.wait()
    with pytest.raises(GenerationError, match="the engine stopped"):
        words(bridge.submit(request(100)))
    assert bridge.state is State.FAILED
    assert isinstance(bridge.failure, ModelError)
    assert bridge.open_requests == 0


def test_a_request_that_the_engine_gives_up_fails_alone(build):
    bridge = build(FakeRunner(vocab_size=258, block_count=4)).wait()  # three blocks of four tokens
    with pytest.raises(GenerationError):
        words(bridge.submit(request(100)))
    assert words(bridge.submit(request(2, "a")))[-1].finish is not None


def test_health_is_false_for_a_hung_device_and_true_for_an_idle_one(build):
    gate = threading.Event()

    class Hanging(FakeRunner):
        def collect(self):
            gate.wait()
            return super().collect()

    bridge = build(Hanging(vocab_size=258), stall_s=0.5).wait()
    gevent.sleep(0.7)
    assert bridge.healthy(), "idle for longer than a stall"
    stream = bridge.submit(request(2))
    gevent.sleep(0.1)
    assert bridge.healthy(), "a long step is no stall yet"
    wait_until(lambda: not bridge.healthy(), seconds=3)
    gate.set()
    words(stream)
    wait_until(bridge.healthy)


def test_an_adapter_is_waited_for_while_the_hub_turns_and_loaded_once_however_many_ask(build):
    house = build(slow(delay_s=0.2))
    bridge = house.wait()
    turns = []
    turning = gevent.spawn(lambda: [turns.append(gevent.sleep(0.01)) for _ in range(10)])
    asked = [gevent.spawn(bridge.load_adapter, 1, "/fr") for _ in range(3)]
    turning.join()
    assert not any(each.dead for each in asked), "the device is at it yet"
    gevent.joinall(asked, raise_error=True)
    bridge.load_adapter(1, "/fr")
    assert house.runners[0].adapters == {1: "/fr"}
    bridge.drop_adapter(1)
    bridge.drop_adapter(7)
    bridge.load_adapter(2, "/de")
    assert house.runners[0].adapters == {2: "/de"}


def test_who_waits_for_an_adapter_that_is_dropped_waits_no_longer(build):
    house = build(slow(delay_s=0.2))
    bridge = house.wait()
    asked = gevent.spawn(bridge.load_adapter, 1, "/fr")
    gevent.sleep(0.05)
    bridge.drop_adapter(1)
    asked.join(0.1)
    assert "unloaded meanwhile" in str(asked.exception)
    bridge.load_adapter(2, "/de")
    assert house.runners[0].adapters == {2: "/de"}


def test_all_who_wait_for_an_adapter_hear_why_it_is_refused(build):
    bridge = build(slow(delay_s=0.05, refuses=lambda directory: "another base")).wait()
    asked = [gevent.spawn(bridge.load_adapter, 1, "/fr") for _ in range(2)]
    gevent.joinall(asked)
    assert [str(each.exception) for each in asked] == ["The adapter cannot be loaded: another base"] * 2


def test_an_adapter_that_a_new_device_refuses_is_told_of(build):
    lost = []
    first = slow()
    again = slow(refuses=lambda directory: "it changed")
    bridge = build(first, again, on_adapter_lost=lambda number, error: lost.append((number, str(error)))).wait()
    bridge.load_adapter(1, "/fr")
    first.kill()
    wait_until(lambda: lost)
    assert lost == [(1, "The adapter cannot be loaded: it changed")]


@pytest.mark.parametrize("end", ["close", "no device is left"])
def test_nobody_waits_for_an_adapter_when_nobody_loads_it(build, end):
    bridge = build(slow(delay_s=0.3, dies_on=lambda plan: end != "close")).wait()
    asked = gevent.spawn(bridge.load_adapter, 1, "/fr")
    gevent.sleep(0.05)
    if end == "close":
        bridge.close()
    asked.join(5)
    assert isinstance(asked.exception, ShuttingDown if end == "close" else NotReady)


def test_draining_refuses_new_work_and_lets_open_requests_end(build):
    bridge = build(slow()).wait()
    reader = gevent.spawn(words, bridge.submit(request(30)))
    permit = bridge.permit()
    gevent.sleep(0.05)
    draining = gevent.spawn(bridge.drain, 10)
    gevent.sleep(0.01)
    assert bridge.state is State.DRAINING
    assert not bridge.healthy()
    for call in (bridge.loaded, bridge.permit, lambda: bridge.submit(request())):
        with pytest.raises(ShuttingDown):
            call()
    assert words(bridge.submit(request(3), permit=permit))[-1].finish is not None, "it came before the drain"
    assert reader.get(timeout=5)[-1].finish is not None
    draining.join(timeout=1)
    assert draining.dead


def test_the_deadline_of_a_drain_ends_every_stream_with_an_error(build):
    bridge = build(slow()).wait()
    readers = [gevent.spawn(words, bridge.submit(request(2000))) for _ in range(2)]
    permit = bridge.permit()
    gevent.sleep(0.05)
    began = time.monotonic()
    bridge.drain(0.2)
    assert 0.2 <= time.monotonic() - began < 1.5
    for reader in readers:
        assert str(reader.exception) == "Request failed during generation: server is shutting down"
    with pytest.raises(ShuttingDown):
        bridge.submit(request(), permit=permit)
    assert bridge.open_requests == 0


def test_close_ends_thread_and_device(build):
    house = build(slow())
    bridge = house.wait()
    stream = bridge.submit(request(2000))
    bridge.close()
    assert house.runners[0].closed
    assert not any(thread.name == "engine" for thread in threading.enumerate())
    with pytest.raises(GenerationError):
        words(stream)


def test_close_does_not_wait_for_a_model_that_still_loads(build):
    gate = threading.Event()
    house = build(before=gate.wait)
    began = time.monotonic()
    house.bridge.close()
    assert time.monotonic() - began < 0.5
    gate.set()
