"""The seam between HTTP and the batching decoder: native engine thread on one side, gevent hub on the other.

Knows no HTTP and no tensor: requests go down, outputs come up, and nothing that it does on the hub blocks.
"""

import enum
import functools
import itertools
import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar

import gevent
from gevent.event import AsyncResult, Event
from gevent.queue import Empty, SimpleQueue
from gevent.threadpool import ThreadPool

from serving.engine.engine import Engine
from serving.engine.loop import Abort, Command, DropAdapter, EndSession, EngineLoop, LoadAdapter, Stop, Submit
from serving.errors import (
    AdapterRefused,
    ClientGone,
    GenerationError,
    NotReady,
    Overloaded,
    RequestError,
    ShuttingDown,
    WeirError,
)
from serving.plan import Runner
from serving.protocol import Request, RequestOutput, StepStats

READ = 1  # libev's flag for "readable"
FAREWELL_S = 2.0  # for handlers to write the last event of a stream that was ended for them
DURATION_WEIGHT = 0.1  # of the newest request in the running mean

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class State(enum.StrEnum):
    """Where the server stands in its life."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    FAILED = "failed"


class Client(Protocol):
    """A connected stream socket, as far as it is watched here."""

    def fileno(self) -> int:
        """The file descriptor, negative once closed."""
        ...


class _Held:
    """A permit in use: what the hub knows of a request until its answer has ended."""

    def __init__(self) -> None:
        self.items: SimpleQueue[RequestOutput | WeirError | None] = SimpleQueue()  # None: it was released
        self.watch: _Watch | None = None
        self.submitted = False
        self.in_engine = False  # submitted, and neither finished nor aborted


class _Watch:
    """Waits for a client's EOF, with a watcher of its own so that gunicorn's sending and receiving stay undisturbed."""

    def __init__(self, client: Client, on_gone: Callable[[], None]) -> None:
        self._fileno = client.fileno()
        self._on_gone = on_gone
        self._watcher = None
        if self._fileno < 0:
            gevent.get_hub().loop.run_callback(on_gone)
        else:
            self._watcher = gevent.get_hub().loop.io(self._fileno, READ)
            self._watcher.start(self._look)

    def _look(self) -> None:
        probe = socket.socket(fileno=self._fileno)
        try:
            seen = probe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            seen = b""
        finally:
            probe.detach()  # the descriptor belongs to gunicorn
        self.stop()
        if not seen:
            self._on_gone()

    def stop(self) -> None:
        """End the watch; the next request on the connection may be read. Safe to call twice."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None


class Permit:
    """One of the `permits` requests that may be open at a time; held during validation, then handed to `submit`.

    A context manager: leaving the block gives it back unless a stream took it over.
    """

    def __init__(self, bridge: "Bridge[Any]", number: int) -> None:
        self.number = number
        self._bridge = bridge
        self.handed_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the permit back, unless a stream has it. Safe to call twice."""
        if not self.handed_over:
            self._bridge.release(self.number)

    def __del__(self) -> None:
        if not self.handed_over:
            self._bridge.release_from_anywhere(self.number)


class ResponseStream:
    """The outputs of what one client asked. Closing it, for any reason, is the cancellation; losing it closes it too.

    Args:
        numbers: the bridge's, one for each request; `RequestOutput.request_id` is one of them.
        items: where the outputs of all of them arrive.
    """

    def __init__(
        self, bridge: "Bridge[Any]", numbers: Sequence[int], items: "SimpleQueue[RequestOutput | WeirError | None]"
    ) -> None:
        self.numbers = numbers
        self._bridge = bridge
        self._items = items

    def __iter__(self) -> Iterator[RequestOutput | None]:
        """Yield outputs as they come, each request's last one with `finish`; `None` when a keep-alive is due.

        To be used once.

        Raises:
            GenerationError: the engine gave a request up, or the server has to stop before its end.
            ClientGone: the client closed its side.
        """
        running = len(self.numbers)
        try:
            while running:
                try:
                    item = self._items.get(timeout=self._bridge.keep_alive_s)
                except Empty:
                    yield None
                    continue
                if item is None:  # a request was released, here at its end or elsewhere for good
                    if not self._bridge.holds_any(self.numbers):
                        return
                    continue
                if isinstance(item, WeirError):
                    raise item
                if item.error is not None:
                    raise GenerationError(item.error)
                if item.finish is not None:
                    running -= 1
                    if running:  # the last one is released when its output is dealt with: see `drain`
                        self._bridge.release(item.request_id)
                yield item
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Abort the requests that are unfinished and give the permits back. Safe to call twice."""
        for number in self.numbers:
            self._bridge.release(number)

    def __del__(self) -> None:
        for number in self.numbers:
            self._bridge.release_from_anywhere(number)


class Bridge(Generic[T]):
    """Owns the engine thread, the permits and the open streams; all of it belongs to the thread that made the bridge.

    Args:
        start: runs in the engine thread, since it takes long: loads the model and returns the engine, a function that
            starts a runner anew after the first one died, and whatever the HTTP side needs of the loaded model.
        permits: requests that may be open at a time.
        keep_alive_s: seconds without an output after which a stream yields `None`.
        stall_s: seconds without a step, with work there, after which the engine counts as hung.
        offload_threads: threads that `offload` may use at a time, and as many for `offload_long`.
        on_step: called on the hub with the numbers of every step.
        on_adapter_lost: called on the hub with the number of an adapter that could not be loaded again after the
            device process died, and why.
    """

    def __init__(
        self,
        start: Callable[[], tuple[Engine, Callable[[], Runner], T]],
        *,
        permits: int,
        keep_alive_s: float = 15.0,
        stall_s: float = 60.0,
        offload_threads: int = 2,
        on_step: Callable[[StepStats], None] | None = None,
        on_adapter_lost: Callable[[int, RequestError], None] | None = None,
    ) -> None:
        self.keep_alive_s = keep_alive_s
        self._start = start
        self._permits = permits
        self._stall_s = stall_s
        self._on_step = on_step
        self._on_adapter_lost = on_adapter_lost
        self._state = State.LOADING
        self._failure: BaseException | None = None
        self._loaded: T | None = None
        self._engine_loop: EngineLoop | None = None
        self._held: dict[int, _Held] = {}
        self._numbers = itertools.count(1)
        self._adapters: dict[int, AsyncResult] = {}  # by number: None once it is loaded, or why it cannot be
        self._mean_inference_s = 0.0
        self._latest: StepStats | None = None
        self._empty = Event()
        self._empty.set()
        self._pool = ThreadPool(offload_threads)
        self._long_pool = ThreadPool(offload_threads)
        self._hub_loop = gevent.get_hub().loop
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._thread.start()

    # -- the engine thread: nothing below touches the hub's state but through `_to_hub` -------------------------------

    def _run_engine(self) -> None:
        try:
            engine, start_runner, loaded = self._start()
            try:
                loop = EngineLoop(
                    engine, self._inbox, self._publish, start_runner, self._runner_changed, self._adapter_changed
                )
                self._to_hub(self._become_ready, loop, loaded)
                loop.run()
            finally:
                engine.close()
        except BaseException as error:  # whatever it was, the hub has to know that nobody decodes any more
            self._to_hub(self._fail, error)

    def _publish(self, outputs: list[RequestOutput], stats: StepStats) -> None:
        self._to_hub(self._deliver, outputs, stats)

    def _runner_changed(self, alive: bool) -> None:
        self._to_hub(self._recovered if alive else self._recover)

    def _adapter_changed(self, number: int, error: RequestError | None) -> None:
        self._to_hub(self._settle_adapter, number, error)

    def _to_hub(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        self._hub_loop.run_callback_threadsafe(function, *args, **kwargs)

    # -- callbacks on the hub: they may not wait ----------------------------------------------------------------------

    def _become_ready(self, loop: EngineLoop, loaded: T) -> None:
        self._engine_loop = loop
        self._loaded = loaded
        if self._state is State.LOADING:
            self._state = State.READY
            log.info("Ready")

    def _recover(self) -> None:
        log.warning("The device process died; starting another, %d open requests go on", len(self._held))
        if self._state is State.READY:
            self._state = State.RECOVERING

    def _recovered(self) -> None:
        log.info("Ready again")
        if self._state is State.RECOVERING:
            self._state = State.READY

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        if self._state is not State.DRAINING:
            self._state = State.FAILED
        for held in self._held.values():
            held.in_engine = False
        self._end_streams(GenerationError("the engine stopped"))
        self._end_loading(NotReady())

    def _deliver(self, outputs: list[RequestOutput], stats: StepStats) -> None:
        for output in outputs:
            held = self._held.get(output.request_id)
            if held is None:
                continue  # closed meanwhile; its abort is on the way
            if output.finish is not None or output.error is not None:
                held.in_engine = False
            if output.finish is not None:
                newest = output.finish.inference_s
                mean = self._mean_inference_s or newest
                self._mean_inference_s = mean + DURATION_WEIGHT * (newest - mean)
            held.items.put(output)
        self._latest = stats
        if self._on_step is not None:
            self._on_step(stats)

    def _settle_adapter(self, number: int, error: RequestError | None) -> None:
        asked = self._adapters.get(number)
        if error is not None:
            self._adapters.pop(number, None)
        if asked is not None and not asked.ready():
            asked.set(error)
        elif error is not None and self._on_adapter_lost is not None:
            self._on_adapter_lost(number, error)

    def _client_gone(self, number: int) -> None:
        held = self._held.get(number)
        if held is not None:
            held.items.put(ClientGone())
            self.release(number)

    def _end_streams(self, error: WeirError) -> None:
        """End every open stream with `error`; permits that no stream has yet are taken away."""
        for number, held in list(self._held.items()):
            if not held.submitted:
                self.release(number)
                continue
            if held.in_engine:
                held.in_engine = False
                self._inbox.put(Abort(number))
            held.items.put(error)

    def _end_loading(self, error: RequestError) -> None:
        for asked in self._adapters.values():
            if not asked.ready():
                asked.set(error)

    # -- for the handlers of requests ---------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the server stands."""
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine thread, if anything did."""
        return self._failure

    @property
    def open_requests(self) -> int:
        """Permits in use."""
        return len(self._held)

    def loaded(self) -> T:
        """What `start` returned for this side.

        Raises:
            NotReady: the model is not there, or not there again.
            ShuttingDown: the server takes no new work.
        """
        if self._state is State.DRAINING:
            raise ShuttingDown
        if self._state is not State.READY or self._loaded is None:
            raise NotReady
        return self._loaded

    def healthy(self) -> bool:
        """Whether a request sent now would be served; reads what is known and never waits."""
        loop = self._engine_loop
        if self._state is not State.READY or loop is None or not self._thread.is_alive():
            return False
        return not loop.busy or time.monotonic() - loop.last_progress < self._stall_s

    def permit(self) -> Permit:
        """Take a permit, without waiting for one.

        Raises:
            Overloaded: every permit is taken.
            NotReady, ShuttingDown: as `loaded`.
        """
        self.loaded()
        if len(self._held) >= self._permits:
            raise Overloaded(self._retry_after_s())
        number = next(self._numbers)
        self._held[number] = _Held()
        self._empty.clear()
        return Permit(self, number)

    def submit(self, request: Request, client: Client | None = None, permit: Permit | None = None) -> ResponseStream:
        """Hand a request to the engine; as `submit_all`, with a permit taken here if none was taken before.

        Raises:
            Overloaded: every permit is taken.
        """
        return self.submit_all([request], client, [permit or self.permit()])

    def submit_all(
        self, requests: Sequence[Request], client: Client | None, permits: Sequence[Permit]
    ) -> ResponseStream:
        """Hand the requests that make one answer to the engine.

        Args:
            client: its connection; when that ends, so do the requests. Bytes of a next request end the watching.
            permits: one for each request, taken before.

        Raises:
            NotReady, ShuttingDown: a permit was taken away meanwhile; nothing was handed over.
        """
        if not all(permit.number in self._held for permit in permits):
            raise ShuttingDown if self._state is State.DRAINING else NotReady
        items: SimpleQueue[RequestOutput | WeirError | None] = SimpleQueue()
        stream = ResponseStream(self, [permit.number for permit in permits], items)
        for request, permit in zip(requests, permits, strict=True):
            permit.handed_over = True
            held = self._held[permit.number]
            held.items = items
            held.submitted = held.in_engine = True
            self._inbox.put(Submit(permit.number, request))
            if client is not None:
                held.watch = _Watch(client, functools.partial(self._client_gone, permit.number))
        return stream

    def end_session(self, cache_salt: str, session_id: str) -> None:
        """Let the engine know that a session is over."""
        self._inbox.put(EndSession((cache_salt, session_id)))

    def load_adapter(self, number: int, directory: str) -> None:
        """Have the device load a LoRA adapter, and wait for it. Asked again, it is loaded once all the same.

        Args:
            number: at least 1, and never used for another adapter.

        Raises:
            AdapterRefused: the device cannot compute with it, or it was dropped meanwhile.
            NoRoomForAdapter: it has as many as it can hold.
            NotReady, ShuttingDown: as `loaded`.
        """
        asked = self._adapters.get(number)
        if asked is None:
            self.loaded()
            asked = self._adapters[number] = AsyncResult()
            self._inbox.put(LoadAdapter(number, directory))
        while not asked.ready():
            asked.wait(self.keep_alive_s)  # gevent takes a wait without an end for a deadlock where nobody calls
        error = asked.get()
        if error is not None:
            raise error

    def drop_adapter(self, number: int) -> None:
        """Let no new request have an adapter; those under way keep it. It may be loading yet, or unknown."""
        asked = self._adapters.pop(number, None)
        if asked is not None and not asked.ready():
            asked.set(AdapterRefused("it was unloaded meanwhile"))
        self._inbox.put(DropAdapter(number))

    def holds_any(self, numbers: Sequence[int]) -> bool:
        """Whether one of these permits is in use."""
        return any(number in self._held for number in numbers)

    def offload(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in a thread while the hub goes on; its result or its exception comes back here."""
        return self._call_in(self._pool, functools.partial(function, *args, **kwargs))

    def offload_long(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `offload`, for what may take a second: in threads of its own, so that nothing quick waits behind it."""
        return self._call_in(self._long_pool, functools.partial(function, *args, **kwargs))

    @staticmethod
    def _call_in(pool: ThreadPool, function: Callable[[], R]) -> R:
        def attempt() -> tuple[R | None, Exception | None]:  # gevent prints what is raised in its threads
            try:
                return function(), None
            except Exception as error:
                return None, error

        result, error = pool.apply(attempt)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]  # gevent is untyped

    def release(self, number: int) -> None:
        """Take a permit back and abort its request if the engine still has it; only the first call counts."""
        held = self._held.pop(number, None)
        if held is None:
            return
        if held.watch is not None:
            held.watch.stop()
        if held.in_engine:
            self._inbox.put(Abort(number))
        held.items.put(None)
        if not self._held:
            self._empty.set()

    def release_from_anywhere(self, number: int) -> None:
        """As `release`, for finalizers: the garbage collector may run in any thread."""
        if number in self._held:
            self._to_hub(self.release, number)

    def _retry_after_s(self) -> int:
        """Seconds, 1 to 60, until who waits was served: mean service time x waiting / served at a time."""
        waiting, running = (self._latest.waiting, self._latest.running) if self._latest is not None else (0, 0)
        return min(60, max(1, math.ceil(self._mean_inference_s * (waiting + 1) / max(1, running))))

    # -- for the worker: the end --------------------------------------------------------------------------------------

    def drain(self, deadline_s: float) -> None:
        """Take no new work, wait for the open requests, and end with an error those that pass the deadline."""
        self._state = State.DRAINING
        if self._held:
            log.info("Draining: up to %.0f s for %d open requests", deadline_s, len(self._held))
        self._empty.wait(deadline_s)
        self._end_streams(GenerationError("server is shutting down"))
        self._empty.wait(FAREWELL_S)

    def close(self, patience_s: float = 3.0) -> None:
        """End every stream, the engine thread and with it the runner; a thread that does not end in time is left."""
        self._state = State.DRAINING
        self._end_streams(GenerationError("server is shutting down"))
        self._end_loading(ShuttingDown())
        self._inbox.put(Stop())
        limit = time.monotonic() + (patience_s if self._engine_loop is not None else 0.0)
        while self._thread.is_alive() and time.monotonic() < limit:
            gevent.sleep(0.01)
        for pool in (self._pool, self._long_pool):
            with gevent.Timeout(1.0, False):
                pool.kill()
