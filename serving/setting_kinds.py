"""The kinds of values that settings have, and how each is read from a text.

Knows no setting.
"""

import math
import re
import types
from collections.abc import Mapping
from typing import Any

import click


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click only
    """An amount of memory in bytes, written with or without a unit."""

    name = "size"
    pattern = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = self.pattern.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is not a size; write bytes, or a number with a unit such as 512MB or 2GiB.")
        number, unit, binary = match.groups()
        step = 1024 if binary else 1000
        whole, power = float(number), " kmgt".index((unit or " ").lower())
        return int(number) * step**power if number.isdigit() else int(whole * step**power)


class Boolean(click.ParamType):  # type: ignore[type-arg]  # see Size
    """True or false; a flag without a value is true."""

    name = "[boolean]"
    words = types.MappingProxyType({"true": True, "1": True, "false": False, "0": False})

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if value.lower() not in self.words:
            self.fail(f"{value!r} is neither true nor false.")
        return self.words[value.lower()]


class Integer(click.IntRange):
    """A whole number."""

    name = "integer"


class Number(click.FloatRange):
    """A finite number."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.")
        return number


def kind_of(plain: type, meta: Mapping[str, Any]) -> "click.ParamType[Any]":
    """The kind of a setting.

    Args:
        plain: its type.
        meta: with `size`, `choices`, `least` and `most`, as a line of the table says them.
    """
    if meta["size"]:
        return Size()
    if meta["choices"]:
        return click.Choice(meta["choices"])
    if plain is bool:
        return Boolean()
    if plain is int:
        return Integer(meta["least"], meta["most"])
    return Number(meta["least"], meta["most"]) if plain is float else click.STRING
