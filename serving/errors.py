"""The error tree: what can go wrong, said once, in the words the wire uses.

Knows no HTTP status (that is `api/errors.py`) and no component that raises these.
"""

from collections.abc import Iterable
from typing import ClassVar


class WeirError(Exception):
    """The root: everything that Weir raises on purpose."""


class ConfigurationError(WeirError):
    """The operator's input cannot work (a flag, a model directory, too little memory); the text says what to do."""


class ModelError(ConfigurationError):
    """The model's files are missing, broken or of a kind that is not served."""


class RunnerDied(WeirError):
    """The process that owns the device ended or broke its frame protocol; its sequences can be computed again."""


class RequestError(WeirError):
    """One request cannot be served; `str(error)` is the message its client reads.

    Attributes:
        error_type: the machine-readable name that stands beside the message on the wire.
    """

    error_type: ClassVar[str] = "generation"
    prefix: ClassVar[str] = ""

    def __init__(self, detail: str) -> None:
        super().__init__(f"{self.prefix}{detail}")
        self.detail = detail


class ValidationError(RequestError):
    """The request breaks a rule or a limit."""

    error_type = "validation"
    prefix = "Input validation error: "


class SuffixNotSupported(RequestError):
    """The answer shall have something behind it."""

    error_type = "suffix not supported"

    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.")


class TooManyPrompts(RequestError):
    """One request has more prompts than the operator allows."""

    error_type = "batch size exceeded"

    def __init__(self, most: int) -> None:
        super().__init__(f"Number of prompts exceeds the maximum allowed batch size of {most}")


class NoInstances(RequestError):
    """A batch of Vertex's is empty."""

    error_type = "Input validation error"

    def __init__(self) -> None:
        super().__init__("Input validation error")


class ModelNotFound(RequestError):
    """No model of that name is served."""

    error_type = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model `{name[:200]}` does not exist")


class UnknownSession(RequestError):
    """No open session has this id."""

    error_type = "unknown_session"

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"The session `{session_id[:200]}` is not open; begin one with the body "
            '{"requestType": "NEW_SESSION"}, and name it in the header X-Amzn-SageMaker-Session-Id'
        )


class UnknownRoute(RequestError):
    """The attributes of an invocation lead nowhere."""

    error_type = "unknown_route"

    def __init__(self, path: str, known: Iterable[str]) -> None:
        super().__init__(f"`route={path[:200]}` leads nowhere; the routes are {', '.join(sorted(known))}")


class AdapterNotFound(RequestError):
    """No adapter of that name is there."""

    error_type = "adapter_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The adapter `{name[:200]}` does not exist")


class AdaptersUnsupported(RequestError):
    """The server was started without room for adapters."""

    error_type = "adapters_unsupported"

    def __init__(self) -> None:
        super().__init__(
            "No adapter can be loaded: no memory is set aside for any; start the server with --max-lora-adapters "
            "(MAX_LORA_ADAPTERS, or SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY)"
        )


class AdapterRefused(RequestError):
    """The device cannot compute with this adapter; the text says why and names no path."""

    error_type = "adapter_refused"
    prefix = "The adapter cannot be loaded: "


class AdapterConflict(RequestError):
    """Another adapter has this name."""

    error_type = "adapter_conflict"

    def __init__(self, name: str) -> None:
        super().__init__(f"The adapter `{name[:200]}` is there already and came from another place; unload it first")


class NoRoomForAdapter(RequestError):
    """As many adapters are loaded as memory was set aside for."""

    error_type = "no_room_for_adapter"

    def __init__(self, detail: str) -> None:
        super().__init__(f"{detail}, or start the server with a larger --max-lora-adapters (MAX_LORA_ADAPTERS)")


class TemplateError(RequestError):
    """The chat template is missing or refuses these messages."""

    error_type = "template_error"
    prefix = "Template error: "


class ToolError(RequestError):
    """The request's tools cannot be used."""

    error_type = "tool_error"
    prefix = "Tool error: "


class GenerationError(RequestError):
    """The engine accepted the request and could not finish it."""

    error_type = "generation"
    prefix = "Request failed during generation: "


class IncompleteGeneration(RequestError):
    """A generation ended without a last token."""

    error_type = "incomplete_generation"

    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class IncompleteGenerationStream(RequestError):
    """A stream ended without a last token."""

    error_type = "incomplete_generation_stream"

    def __init__(self) -> None:
        super().__init__("Incomplete generation stream")


class Unavailable(RequestError):
    """The request may be sent again later.

    Attributes:
        retry_after_s: whole seconds after which a client may try again.
    """

    def __init__(self, detail: str, retry_after_s: int) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """Every permit is taken."""

    error_type = "overloaded"

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__("Model is overloaded", retry_after_s)


class NotReady(Unavailable):
    """The model is still loading, or being loaded again after its process died."""

    error_type = "not_ready"

    def __init__(self, retry_after_s: int = 5) -> None:
        super().__init__("Model is loading", retry_after_s)


class ShuttingDown(Unavailable):
    """The server drains: running requests finish, new ones go elsewhere."""

    error_type = "shutting_down"

    def __init__(self, retry_after_s: int = 5) -> None:
        super().__init__("Server is shutting down", retry_after_s)


class Unhealthy(RequestError):
    """The health check's negative answer."""

    error_type = "healthcheck"

    def __init__(self) -> None:
        super().__init__("unhealthy")


class ClientGone(WeirError):
    """The client closed its connection before the answer was whole; nobody is left to tell."""
