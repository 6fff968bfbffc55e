"""The instances of an endpoint, which of them gets a request, and the exchange with it.

Knows the platform's limits and error texts, no route and no dialect.
"""

import random
import socket
import threading
import time
from collections.abc import Callable, Mapping

from scripts.emulator.containers import Container, Stop
from scripts.emulator.errors import ServiceError, invalid, model_error, unavailable
from scripts.emulator.instance import Instance, State
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.sessions import Sessions
from scripts.emulator.upstream import Address, Broken, Exchange, Expired, TooLarge, Unreachable, UpstreamError

INVOCATIONS = "/invocations"
TIMED_OUT = (
    "Your invocation timed out while waiting for a response from container primary. Review the latency metrics for "
    "each container in Amazon CloudWatch, resolve the issue, and try again."
)


class Fleet:
    """Starts, asks and stops the instances of one endpoint.

    Args:
        name: of the endpoint.
        make: a container for one instance.
        count: of instances.
        limits: the platform's.
        journal: gets told.
        seed: of the routing, which is random as the platform's default is.
        prepare: called with a container's address before it serves.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Container],
        count: int,
        limits: Limits,
        journal: Journal,
        seed: int,
        prepare: Callable[[Address], None],
    ) -> None:
        self.name = name
        self.limits = limits
        self.sessions = Sessions(journal)
        self.instances = [
            Instance(f"{name}/{number}", make, limits, journal, prepare) for number in range(1, count + 1)
        ]
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        self._invocations = 0

    def start(self) -> None:
        """Begin; `wait_in_service` says what came of it."""
        for instance in self.instances:
            instance.start()

    def wait_in_service(self, seconds: float) -> bool:
        """Whether every instance came into service."""
        deadline = time.monotonic() + seconds
        return all(instance.wait(max(deadline - time.monotonic(), 0)) for instance in self.instances)

    def end(self) -> None:
        """Stop them all, at the same time."""
        enders = [threading.Thread(target=instance.end) for instance in self.instances]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()

    @property
    def stops(self) -> list[Stop]:
        """How containers ended so far."""
        return [stop for instance in self.instances for stop in instance.stops]

    @property
    def invocations(self) -> int:
        """Requests that were sent to a container: a client's retries count."""
        return self._invocations

    @property
    def state(self) -> State:
        """Of the endpoint: that of its instance that is furthest from service."""
        states = [instance.state for instance in self.instances]
        order = (State.FAILED, State.CREATING, State.DELETING, State.UPDATING)
        return next((state for state in order if state in states), State.IN_SERVICE)

    def route(self, session: str | None) -> Instance:
        """The instance for a request. Raises ServiceError when none serves."""
        serving = [instance for instance in self.instances if instance.address is not None]
        home = self.sessions.instance_of(session)
        if home in serving:
            assert home is not None
            return home
        if serving:
            with self._lock:
                return self._draw.choice(serving)
        if self.state is State.CREATING:
            raise invalid(
                f"Endpoint {self.name} is being created: its container has not answered "
                f"{self.limits.pings_to_serve} pings with 200 yet."
            )
        raise unavailable(f"No instance of endpoint {self.name} is in service (its status is {self.state}).")

    def send(
        self,
        instance: Instance,
        headers: Mapping[str, str],
        body: bytes,
        *,
        path: str = INVOCATIONS,
        deadline_s: float,
        client: socket.socket | None,
    ) -> Exchange:
        """Ask an instance. Raises UpstreamError."""
        address = instance.address
        if address is None:
            raise Unreachable("the container is being replaced")
        with self._lock:
            self._invocations += 1
        return Exchange(
            address,
            path,
            headers,
            body,
            connect_timeout_s=self.limits.connect_timeout_s,
            deadline_s=deadline_s,
            client=client,
        )

    def no_answer(self, error: UpstreamError) -> ServiceError:
        """What the client is told when the container gave no answer, or not the whole of it."""
        if isinstance(error, Expired):
            return model_error(self.name, 0, TIMED_OUT)
        if isinstance(error, TooLarge):
            return model_error(self.name, 500, f"The answer is too large: {error}.")
        if isinstance(error, Broken):
            return model_error(self.name, 0, f"The container closed the connection before it had answered ({error}).")
        return model_error(self.name, 0, f"The container cannot be reached: {error}.")
