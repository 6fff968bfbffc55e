"""The bodies of `/vertex`.

Knows no rule on values: those are the validator's.
"""

from typing import Annotated

from msgspec import Struct
from pydantic import Field

from serving.api.schemas.chat import ChatRequest
from serving.api.schemas.native import GenerateRequest
from serving.api.schemas.strict import Array, StrictModel
from serving.validation.parameters import Parameters


class VertexGenerate(GenerateRequest):
    """A text to go on with."""

    def checked_later(self) -> Parameters:
        """For the validator; as in the original only the length and the seed count, and tokens are drawn."""
        return Parameters(do_sample=True, max_new_tokens=self.parameters.max_new_tokens, seed=self.parameters.seed)


class VertexRequest(StrictModel):
    """The body of `/vertex`."""

    instances: Array[Annotated[VertexGenerate | ChatRequest, Field(union_mode="left_to_right")]]


class VertexResponse(Struct, frozen=True):
    """The answer of `/vertex`: texts, in the order of the instances."""

    predictions: list[str]
