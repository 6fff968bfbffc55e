"""Fields of request bodies, as strict as the original's: no boolean is a number, no 1.0 an integer, no null a default.

Knows no dialect.
"""

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST_F32 = 3.4028234663852886e38

I32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
U32 = Annotated[int, Field(ge=0, lt=2**32)]
U64 = Annotated[int, Field(ge=0, lt=2**64)]
F32 = Annotated[float, Field(ge=-LARGEST_F32, le=LARGEST_F32, allow_inf_nan=False)]


Item = TypeVar("Item")
Array = Annotated[list[Item], Field(fail_fast=True)]


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which some keys stand more than once; the last value counts."""

    def __init__(self, pairs: Iterable[tuple[str, Any]], repeated: frozenset[str]) -> None:
        super().__init__(pairs)
        self.repeated = repeated


class StrictModel(BaseModel):
    """A JSON object; unknown fields are ignored, known ones may stand in it once."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_repeated(cls, value: Any) -> Any:
        if isinstance(value, RepeatedKeys):
            for name in cls.model_fields:
                if name in value.repeated:
                    raise ValueError(f"duplicate field `{name}`")
        return value
