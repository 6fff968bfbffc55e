"""The engine thread's body: commands in from a queue, steps, outputs out through a callback.

Knows no gevent and starts no thread: whoever runs it decides where; the inbox and `publish` are the only crossings.
"""

import queue
import time
from collections.abc import Callable

from msgspec import Struct, field

from serving.engine.engine import Engine
from serving.engine.leases import Key
from serving.errors import AdapterRefused, NoRoomForAdapter, RequestError, RunnerDied
from serving.plan import Runner
from serving.protocol import Request, RequestOutput, StepStats

IDLE_SLICE_S = 0.25
MAX_IDLE_DEATHS = 3


class Submit(Struct, frozen=True):
    """Take a request in; `request_id` is new, `arrived` is `time.monotonic()` of the command's making."""

    request_id: int
    request: Request
    arrived: float = field(default_factory=time.monotonic)


class Abort(Struct, frozen=True):
    """Nobody wants the rest of a request; ids that finished already are ignored."""

    request_id: int


class EndSession(Struct, frozen=True):
    """Keep nothing more for a session; `key` is its tenant's salt and its id."""

    key: Key


class LoadAdapter(Struct, frozen=True):
    """Have the device load the LoRA adapter in a directory; `number` is new, and 1 at least."""

    number: int
    directory: str


class DropAdapter(Struct, frozen=True):
    """No new request has this adapter; unknown ones are ignored."""

    number: int


class Stop(Struct, frozen=True):
    """Leave `EngineLoop.run`; what still runs gets no further output."""


Command = Submit | Abort | EndSession | LoadAdapter | DropAdapter | Stop


class EngineLoop:
    """The engine thread's body.

    Args:
        inbox: commands, put by any thread.
        publish: called once a step with its outputs (perhaps none), while the device computes the next; without a
            step, and `Engine.load` as numbers (`rows` is 0), once after a restart with the outputs of the requests
            given up, and once when aborts have left nothing to do.
        start_runner: makes the next runner after one died; what it raises ends `run`.
        on_state: told False when the runner died and True when its successor works.
        on_adapter: told the number of each adapter that came to the device after a LoadAdapter, with None; and with
            the reason the number of each that did not, or that could not be loaded again after a restart.

    Attributes:
        steps: steps done; other threads may read it, and the next two, without a lock.
        last_progress: `time.monotonic()` of the last step or idle look-around.
        busy: whether there was work at that time.
    """

    def __init__(
        self,
        engine: Engine,
        inbox: "queue.SimpleQueue[Command]",
        publish: Callable[[list[RequestOutput], StepStats], None],
        start_runner: Callable[[], Runner],
        on_state: Callable[[bool], None],
        on_adapter: Callable[[int, RequestError | None], None],
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._publish = publish
        self._start_runner = start_runner
        self._on_state = on_state
        self._on_adapter = on_adapter
        self._idle_deaths = 0
        self._made: tuple[list[RequestOutput], StepStats] | None = None
        self.steps = 0
        self.last_progress = time.monotonic()
        self.busy = False

    def run(self) -> None:
        """Serve until Stop.

        Raises:
            RunnerDied: the runner died again and again without having had any work.
            Exception: whatever `start_runner` or `publish` raises; the engine must not be used afterwards.
        """
        while self._take_in():
            if self._engine.has_work():
                self._step()
            elif self.busy:  # the last request was aborted: no step follows whose numbers would say so
                self._hand_out()
                self._publish([], self._engine.load())
            elif not self._engine.alive():
                self._count_idle_death()
                self._recover()
            self.busy = self._engine.has_work()
            self.last_progress = time.monotonic()
        self._hand_out()

    def _take_in(self) -> bool:
        """Empty the inbox, waiting a moment for it when idle; False when told to stop."""
        wait = not self._engine.has_work()
        while True:
            try:
                command = self._inbox.get(block=wait, timeout=IDLE_SLICE_S)
            except queue.Empty:
                return True
            wait = False
            match command:
                case Submit():
                    self._engine.add(command.request_id, command.request, command.arrived)
                    self.busy = True
                case Abort():
                    self._engine.abort(command.request_id)
                case EndSession():
                    self._engine.end_session(command.key)
                case LoadAdapter():
                    self._load_adapter(command)
                case DropAdapter():
                    self._engine.drop_adapter(command.number)
                case Stop():
                    return False

    def _load_adapter(self, asked: LoadAdapter) -> None:
        self._hand_out()  # nobody's tokens wait for it
        try:
            self._engine.load_adapter(asked.number, asked.directory)
        except (AdapterRefused, NoRoomForAdapter) as error:
            self._on_adapter(asked.number, error)
            return
        except RunnerDied:
            self._recover()  # which tries it once more
        if self._engine.has_adapter(asked.number):
            self._on_adapter(asked.number, None)

    def _step(self) -> None:
        try:
            outputs, stats = self._engine.step(meanwhile=self._hand_out)
        except RunnerDied:
            self._hand_out()
            self._publish([], self._engine.lost_step())
            self._recover()
            return
        self._idle_deaths = 0
        self.steps += 1
        self._made = (outputs, stats)
        if not self._engine.has_work():
            self._hand_out()

    def _hand_out(self) -> None:
        """Publish the last step. It is done while the device computes the next: whoever takes the outputs up competes
        with this thread for the interpreter, and the device would wait for it.
        """
        if self._made is not None:
            made, self._made = self._made, None
            self._publish(*made)

    def _recover(self) -> None:
        self._on_state(False)
        outputs = None
        while outputs is None:
            self._engine.close()
            outputs = self._restarted(self._start_runner())
        self._on_state(True)
        self._publish(outputs, self._engine.load())
        for number, reason in self._engine.take_lost_adapters().items():
            self._on_adapter(number, AdapterRefused(reason))

    def _restarted(self, runner: Runner) -> list[RequestOutput] | None:
        try:
            return self._engine.restart(runner)
        except RunnerDied:  # of an adapter that it loaded, which is given up if that happens again
            return None

    def _count_idle_death(self) -> None:
        self._idle_deaths += 1
        if self._idle_deaths > MAX_IDLE_DEATHS:
            raise RunnerDied(f"the device process died {self._idle_deaths} times in a row without having had any work")
