"""The bodies that only SageMaker's contract has.

Knows no dialect's fields.
"""

from typing import Literal

from msgspec import Struct, field

from serving.api.schemas.strict import StrictModel


class SessionRequest(StrictModel):
    """A body that asks for nothing but a session's beginning or end."""

    requestType: Literal["NEW_SESSION", "CLOSE"]  # noqa: N815 - the wire's name


class Status(Struct, frozen=True):
    """What became of a session or an adapter."""

    status: str


class AdapterRequest(StrictModel):
    """An adapter that shall be loaded."""

    name: str
    src: str
    preload: bool = True
    pin: bool = False


class AdapterDescription(Struct, frozen=True):
    """An adapter that is loaded. It stays so until it is unloaded: none makes room for another."""

    name: str
    src: str
    preload: bool = True
    pin: bool = True


class AdapterList(Struct, frozen=True):
    """The adapters that can be asked for."""

    adapters: list[AdapterDescription]


class ExecutionParameters(Struct, frozen=True):
    """How a batch transform had better ask."""

    max_concurrent_transforms: int = field(name="MaxConcurrentTransforms")
    batch_strategy: str = field(name="BatchStrategy")
    max_payload_mb: int = field(name="MaxPayloadInMB")
