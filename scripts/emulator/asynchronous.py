"""Asynchronous inference: a queue in front of the fleet, and results in storage.

Knows no HTTP of the client's side.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from scripts.emulator.errors import ServiceError, model_error
from scripts.emulator.fleet import Fleet
from scripts.emulator.journal import Journal
from scripts.emulator.storage import Storage, StorageError
from scripts.emulator.upstream import UpstreamError

LARGEST_ANSWER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """A request in the queue.

    Attributes:
        identifier: its InferenceId.
        headers: for the container.
        body: inline; None where `input_location` holds it.
        input_location: of the body; None where it came inline.
        output_location: of the answer.
        failure_location: of the error.
        ttl_s: in the queue.
        timeout_s: for the container.
    """

    identifier: str
    headers: Mapping[str, str]
    body: bytes | None
    input_location: str | None
    output_location: str
    failure_location: str
    ttl_s: float
    timeout_s: float


class AsyncQueue:
    """Sends jobs to the fleet, so many at once, and stores what comes of them.

    Args:
        fleet: that answers.
        storage: of bodies and results.
        concurrency: MaxConcurrentInvocationsPerInstance, of all instances together.
        journal: gets told.
    """

    def __init__(self, fleet: Fleet, storage: Storage, concurrency: int, journal: Journal) -> None:
        self._fleet = fleet
        self._storage = storage
        self._journal = journal
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="async")

    def put(self, job: Job) -> None:
        """Queue a job."""
        self._pool.submit(self._run, job, time.monotonic()).add_done_callback(self._report)

    def end(self) -> None:
        """Drop what waits, and wait for what runs."""
        self._pool.shutdown(cancel_futures=True)

    def _report(self, done: Future[None]) -> None:
        if not done.cancelled() and (fault := done.exception()) is not None:
            self._journal.say(f"the emulator failed in an asynchronous request: {fault!r}")

    def _run(self, job: Job, queued: float) -> None:
        try:
            if time.monotonic() - queued > job.ttl_s:
                raise ServiceError(400, "RequestExpired", f"The request waited longer than {job.ttl_s:g} s.")
            self._storage.write(job.output_location, self._answer(job))
            self._journal.say(f"async {job.identifier}: {job.output_location}")
        except ServiceError as error:
            self._fail(job, error)
        except StorageError as error:
            self._fail(job, ServiceError(400, "ValidationError", str(error)))

    def _answer(self, job: Job) -> bytes:
        body = job.body if job.input_location is None else self._storage.read(job.input_location)
        assert body is not None
        instance = self._fleet.route(None)
        try:
            with self._fleet.send(instance, job.headers, body, deadline_s=job.timeout_s, client=None) as exchange:
                answer = exchange.whole(LARGEST_ANSWER_BYTES)
                if exchange.status >= 300:
                    raise model_error(self._fleet.name, exchange.status, answer.decode(errors="replace"))
                return answer
        except UpstreamError as error:
            raise self._fleet.no_answer(error) from error

    def _fail(self, job: Job, error: ServiceError) -> None:
        self._journal.say(f"async {job.identifier}: {error.code}: {error}")
        try:
            self._storage.write(job.failure_location, error.body())
        except StorageError as trouble:
            self._journal.say(f"async {job.identifier}: {trouble}")
