"""What OpenAI's bodies have in common, in the order of their keys.

Knows no route.
"""

from msgspec import Struct

from serving.api.schemas.strict import StrictModel

OWN_NAMES = ("", "tgi")  # of a model: whatever is served
MAX_NAME = 256  # characters of a client's name for a model that are said back, in every chunk of a stream


def model_or(asked: str | None, served: str) -> str:
    """The name that an answer bears: the client's own as far as it is a name, or the served one."""
    return served if asked is None or asked in OWN_NAMES else asked[:MAX_NAME]


class StreamOptions(StrictModel):
    """How a stream ends."""

    include_usage: bool = False


class TopLogprob(Struct, frozen=True):
    """An alternative to a token."""

    token: str
    logprob: float | None


class TokenLogprobs(Struct, frozen=True):
    """A token with its alternatives."""

    token: str
    logprob: float | None
    top_logprobs: list[TopLogprob]


class Logprobs(Struct, frozen=True):
    """The tokens of a text."""

    content: list[TokenLogprobs]


class Usage(Struct, frozen=True):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Model(Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(Struct, frozen=True, kw_only=True):
    """The models that are served."""

    object: str = "list"
    data: list[Model]


class ErrorDetail(Struct, frozen=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    """What went wrong."""

    error: ErrorDetail
    error_type: str
