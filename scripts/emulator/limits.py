"""What the platform grants a container: times, sizes, counts.

Knows nothing of how they are enforced.
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

MAX_ENVIRONMENT_ENTRIES = 100
MAX_ENVIRONMENT_TEXT_BYTES = 1024
MAX_ENVIRONMENT_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds; the defaults are AWS's, or ours where AWS names none (`pings_...`, `ping_interval_s`).

    Attributes:
        ping_timeout_s: for one answer of /ping.
        connect_timeout_s: for a container to accept a connection.
        startup_s: for /ping to become healthy (ContainerStartupHealthCheckTimeoutInSeconds).
        ping_interval_s: between two pings.
        pings_to_serve: healthy pings in a row before requests come.
        pings_to_replace: unhealthy pings in a row before the container is replaced.
        invoke_s: for a whole answer of InvokeEndpoint.
        stream_s: for a whole stream.
        async_s: for an asynchronous answer, unless the request says.
        async_ttl_s: in the queue, unless the request says.
        stop_s: from SIGTERM to SIGKILL.
        payload_bytes: of a request, and of a whole answer.
        inline_async_bytes: of the body of InvokeEndpointAsync.
        attribute_characters: of CustomAttributes.
        scale: what the long times have been multiplied with.
    """

    ping_timeout_s: float = 2.0
    connect_timeout_s: float = 0.25
    startup_s: float = 480.0
    ping_interval_s: float = 5.0
    pings_to_serve: int = 2
    pings_to_replace: int = 3
    invoke_s: float = 60.0
    stream_s: float = 480.0
    async_s: float = 900.0
    async_ttl_s: float = 21600.0
    stop_s: float = 30.0
    payload_bytes: int = 25 * 1024 * 1024
    inline_async_bytes: int = 128_000
    attribute_characters: int = 1024
    scale: float = 1.0

    def scaled(self, factor: float) -> Self:
        """The same with every long time multiplied, so that a test need not wait a minute.

        What a container needs its real time for stays: accepting a connection and answering a ping.
        """
        return dataclasses.replace(
            self,
            startup_s=self.startup_s * factor,
            ping_interval_s=self.ping_interval_s * factor,
            invoke_s=self.invoke_s * factor,
            stream_s=self.stream_s * factor,
            async_s=self.async_s * factor,
            async_ttl_s=self.async_ttl_s * factor,
            stop_s=self.stop_s * factor,
            scale=self.scale * factor,
        )


def environment_trouble(environment: dict[str, str]) -> str | None:
    """Why CreateModel would refuse this container's environment; None if it would not."""
    if len(environment) > MAX_ENVIRONMENT_ENTRIES:
        return f"{len(environment)} variables; SageMaker takes {MAX_ENVIRONMENT_ENTRIES}: put them into a file"
    for name, value in environment.items():
        if max(len(name.encode()), len(value.encode())) > MAX_ENVIRONMENT_TEXT_BYTES:
            return f"{name} is longer than SageMaker's {MAX_ENVIRONMENT_TEXT_BYTES} bytes: put it into a file"
    total = sum(len(name.encode()) + len(value.encode()) for name, value in environment.items())
    if total > MAX_ENVIRONMENT_BYTES:
        return f"the variables take {total} bytes together; SageMaker takes {MAX_ENVIRONMENT_BYTES}"
    return None
