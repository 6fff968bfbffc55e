"""One instance of an endpoint: a container under the platform's health checks, from launch to replacement to end.

Knows no request but the ping.
"""

import threading
import time
from collections.abc import Callable
from enum import StrEnum

import urllib3

from scripts.emulator.containers import Container, ContainerError, Stop
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.upstream import Address

LAUNCH_PAUSE_S = 1.0  # between two pings until the container is in service
LOG_TAIL = 20


class State(StrEnum):
    """As DescribeEndpoint would say it."""

    CREATING = "Creating"
    IN_SERVICE = "InService"
    UPDATING = "Updating"
    FAILED = "Failed"
    DELETING = "Deleting"


class Instance:
    """Starts a container, pings it, replaces it when it is ill, and stops it.

    Args:
        name: for people.
        make: a new container, not started.
        limits: how long and how often.
        journal: gets told.
        prepare: called with the container's address each time it is about to serve; it loads adapters.

    Attributes:
        state: what it is now.
        address: of the container that serves.
        stops: how its containers ended.
        why: it failed.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Container],
        limits: Limits,
        journal: Journal,
        prepare: Callable[[Address], None],
    ) -> None:
        self.name = name
        self.state = State.CREATING
        self.address: Address | None = None
        self.stops: list[Stop] = []
        self.why: str | None = None
        self._make = make
        self._limits = limits
        self._journal = journal
        self._prepare = prepare
        self._leave = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._live, name=name)
        self._container: Container | None = None

    def start(self) -> None:
        """Begin; `wait` says what came of it."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it came into service. Returns as soon as it did or failed."""
        self._settled.wait(seconds)
        return self.state is State.IN_SERVICE

    def end(self) -> None:
        """Stop the container, with SIGKILL when it takes too long."""
        self._leave.set()
        self._thread.join()

    def _live(self) -> None:
        try:
            while not self._leave.is_set() and self._launch():
                self._serve()
                if not self._leave.is_set():
                    self.state = State.UPDATING
                    self._journal.say(f"{self.name} is replaced")
                    self._stop_container()
        except ContainerError as error:
            self._fail(str(error))
        finally:
            if self.state is not State.FAILED:
                self.state = State.DELETING
            self._settled.set()
            self._stop_container()

    def _launch(self) -> bool:
        """Start a container and wait for its pings. False: it failed, or we are leaving."""
        container = self._container = self._make()
        container.start()
        begun = time.monotonic()
        healthy = 0
        reason: str | None = "never asked"
        while not self._leave.is_set():
            healthy = healthy + 1 if (reason := self._ping()) is None else 0
            if healthy == self._limits.pings_to_serve:
                break
            if not container.running():
                return self._fail("the container ended before it was healthy")
            if time.monotonic() - begun > self._limits.startup_s:
                return self._fail(
                    f"/ping was not healthy within {self._limits.startup_s:g} s (last: {reason or 'healthy'}). "
                    "SageMaker: 'did not pass the ping health check'; a model that takes longer to load needs "
                    "ContainerStartupHealthCheckTimeoutInSeconds (here --startup-timeout)."
                )
            self._leave.wait(min(LAUNCH_PAUSE_S, self._limits.ping_interval_s))
        if self._leave.is_set():
            return False
        self._prepare(container.address)
        self.address = container.address
        self.state = State.IN_SERVICE
        self._settled.set()
        self._journal.say(f"{self.name} is InService after {time.monotonic() - begun:.1f} s, at {container.address}")
        return True

    def _serve(self) -> None:
        """Ping until it is ill or we leave."""
        ill = 0
        while not self._leave.wait(self._limits.ping_interval_s):
            assert self._container is not None
            if not self._container.running():
                self._journal.blame(f"{self.name}: the container ended while it served")
                self._show_log()
                return
            reason = self._ping()
            ill = ill + 1 if reason else 0
            if reason:
                self._journal.say(f"{self.name}: ping {ill} of {self._limits.pings_to_replace} failed: {reason}")
            if ill == self._limits.pings_to_replace:
                self._journal.blame(f"{self.name}: /ping failed {ill} times in a row: {reason}")
                return

    def _ping(self) -> str | None:
        assert self._container is not None
        return ping(self._container.address, self._limits)

    def _stop_container(self) -> None:
        self.address = None
        container, self._container = self._container, None
        if container is None:
            return
        stop = container.stop(self._limits.stop_s)
        if stop is not None:
            self.stops.append(stop)
            self._journal.say(f"{self.name} {stop}")
            if stop.killed:
                self._journal.blame(
                    f"{self.name} did not end within {self._limits.stop_s:g} s of SIGTERM and was killed. Does the "
                    "server run as process 1 (a shell script has to `exec` it), and does it drain in time?"
                )
        if written := container.written_to():
            self._journal.blame(
                f"{self.name} wrote to the model directory, which SageMaker mounts read-only: {written}"
            )

    def _fail(self, why: str) -> bool:
        self.state = State.FAILED
        self.why = why
        self._journal.blame(f"{self.name} failed: {why}")
        self._show_log()
        self._settled.set()
        return False

    def _show_log(self) -> None:
        for line in self._container.log_tail()[-LOG_TAIL:] if self._container is not None else ():
            self._journal.say(f"{self.name} | {line}")


def ping(address: Address, limits: Limits) -> str | None:
    """Why GET /ping is not healthy; None if it is."""
    timeout = urllib3.Timeout(connect=limits.connect_timeout_s, total=limits.ping_timeout_s)
    with urllib3.HTTPConnectionPool(address.host, address.port, timeout=timeout, retries=False) as pool:
        try:
            answer = pool.request("GET", "/ping")
        except urllib3.exceptions.ConnectTimeoutError:
            return f"no connection within {limits.connect_timeout_s * 1000:.0f} ms"
        except urllib3.exceptions.TimeoutError:
            return f"no answer within {limits.ping_timeout_s:g} s"
        except urllib3.exceptions.NewConnectionError:
            return "connection refused"
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return f"{type(error).__name__}: {error}"
    return None if answer.status == 200 else f"status {answer.status}"
