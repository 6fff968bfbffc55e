"""The emulator as a whole: instances, queue and HTTP, started and ended together.

Knows no command line.
"""

import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import urllib3
from werkzeug.serving import WSGIRequestHandler, make_server

from scripts.emulator.admission import Offer
from scripts.emulator.api import RuntimeApi
from scripts.emulator.asynchronous import AsyncQueue
from scripts.emulator.containers import Container, ContainerError
from scripts.emulator.fleet import Fleet
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.storage import Storage
from scripts.emulator.upstream import Address

LOAD_ADAPTER_S = 300.0
POLL_S = 0.1
BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Deployment:
    """What would be said to CreateEndpointConfig and CreateInferenceComponent.

    Attributes:
        endpoint: its name; the asynchronous one is called the same with `-async` behind.
        instances: how many containers.
        components: names of inference components.
        adapters: names of adapter components, and the directory of each as the container sees it.
        results: where asynchronous results go.
        failures: where their errors go.
        async_concurrency: MaxConcurrentInvocationsPerInstance.
        limits: the platform's.
        seed: of routing, and of where streams are cut.
        largest_part: of a stream, in bytes; 0 leaves parts as they come.
        break_streams_after: parts, with an InternalStreamFailure; None never.
    """

    endpoint: str = "weir"
    instances: int = 1
    components: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    results: str = "s3://emulator/results"
    failures: str = "s3://emulator/failures"
    async_concurrency: int = 4
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    largest_part: int = 64
    break_streams_after: int | None = None


class Emulator:
    """A context: from `__enter__` on it listens and its containers start; `__exit__` stops both.

    Args:
        deployment: what is deployed.
        make: a container for one instance, not started.
        storage: a directory in the place of S3.
        journal: gets told.
        host: to listen at.
        port: to listen at; 0 is any free one.

    Attributes:
        url: for boto3's `endpoint_url`.
        fleet: its containers.

    Raises:
        OSError: that address cannot be listened at.
    """

    def __init__(
        self,
        deployment: Deployment,
        make: Callable[[], Container],
        storage: Path,
        journal: Journal,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        limits = deployment.limits
        self._adapters = deployment.adapters
        self.fleet = Fleet(
            deployment.endpoint, make, deployment.instances, limits, journal, deployment.seed, self._load_adapters
        )
        self._queue = AsyncQueue(
            self.fleet, Storage(storage), deployment.async_concurrency * deployment.instances, journal
        )
        offer = Offer(
            deployment.endpoint,
            f"{deployment.endpoint}-async",
            deployment.components,
            deployment.adapters,
            deployment.results.rstrip("/"),
            deployment.failures.rstrip("/"),
        )
        api = RuntimeApi(
            self.fleet,
            self._queue,
            offer,
            journal,
            seed=deployment.seed,
            largest_part=deployment.largest_part,
            break_streams_after=deployment.break_streams_after,
        )
        # Bound here: werkzeug would end the process where the port is taken.
        with socket.create_server((host, port), backlog=BACKLOG) as listener:
            self._server = make_server(
                host, port, api.application(), threaded=True, request_handler=_Quiet, fd=listener.fileno()
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="http")
        self.url = f"http://{host}:{self._server.socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.fleet.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.end()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._queue.end()

    def _load_adapters(self, address: Address) -> None:
        """`POST /adapters`, as the platform does for adapter components. Raises ContainerError."""
        if not self._adapters:
            return
        with urllib3.HTTPConnectionPool(address.host, address.port, timeout=LOAD_ADAPTER_S, retries=False) as pool:
            for name, source in self._adapters.items():
                asked = json.dumps({"name": name, "src": source, "preload": True, "pin": False})
                try:
                    answer = pool.request("POST", "/adapters", asked, headers={"Content-Type": "application/json"})
                except urllib3.exceptions.HTTPError as error:
                    raise ContainerError(f"POST /adapters for {name}: {error}") from error
                if answer.status != 200:
                    said = answer.data.decode(errors="replace")
                    raise ContainerError(f"POST /adapters for {name} was answered {answer.status}: {said}")


class _Quiet(WSGIRequestHandler):
    """Does not log requests."""

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Say nothing."""
