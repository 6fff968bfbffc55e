"""What LoRA adapters may be called, and how an operator names those to load: `org/name@revision` or `name=place`.

Knows no setting, no file and no device.
"""

import re
from dataclasses import dataclass

from serving.errors import ConfigurationError

LONGEST = 200  # characters of a name
# Each step of a name stands in a URL's path as it is, and none of them is `.` or `..`.
_STEP = r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*"
_NAME = re.compile(rf"{_STEP}(?:/{_STEP})*")
_FORMS = "write org/name, org/name@revision or name=/path"


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter that an operator wants loaded.

    Attributes:
        name: what requests call it.
        place: a directory, a repository of the hub, or s3://bucket/prefix.
        revision: on the hub, where that was said.
    """

    name: str
    place: str
    revision: str | None = None

    @property
    def origin(self) -> str:
        """The place, and the revision where that was said."""
        return f"{self.place}@{self.revision}" if self.revision else self.place

    def __str__(self) -> str:
        """As an operator writes it; `parse` reads it back."""
        return f"{self.name}={self.origin}"


def fault_of(name: str) -> str | None:
    """Why an adapter cannot have this name; None if it can."""
    if len(name) > LONGEST:
        return f"must have at most {LONGEST} characters"
    if not _NAME.fullmatch(name):
        return "must consist of letters, digits and _.:+- (with slashes between), and begin with a letter, a digit or _"
    return None


def parse(text: str) -> NamedAdapter:
    """One item of `--lora-adapters`, as TGI writes them. Raises ConfigurationError."""
    name, equals, place = text.partition("=")
    if not equals:
        place = text
    revision = None
    if not place.startswith(("/", ".", "s3://")):
        place, at, revision = place.partition("@")
        if at and not revision:
            raise ConfigurationError(f"`lora_adapters`: {text!r} ends before its revision; {_FORMS}.")
    if not equals:
        name = place
    if not place:
        raise ConfigurationError(f"`lora_adapters`: {text!r} names no place; {_FORMS}.")
    if fault := fault_of(name):
        raise ConfigurationError(f"`lora_adapters`: the name in {text!r} {fault}; {_FORMS}.")
    return NamedAdapter(name=name, place=place, revision=revision or None)
