"""What one render of a chat template may use of time and memory.

Knows no template and no operation of one: whoever computes asks before and charges afterwards.
"""

import itertools
import sys
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.exceptions import SecurityError

MAX_ITEMS = 250_000  # of one list or dict
MAX_BYTES = 64_000_000  # of all that one render makes
MAX_INTEGER_BITS = 1024
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (list, tuple, dict, *VIEWS)
TOO_LONG = "the template makes too long a text"
TOO_MUCH = "the template uses too much memory"


class Meter:
    """What one render may still use.

    Args:
        time_limit_s: from now.
        max_characters: of one value; of a list or dict with all that is in it, as often as it is in it.
    """

    __slots__ = ("_bytes", "_deadline", "_weights", "max_characters")

    def __init__(self, time_limit_s: float, max_characters: int) -> None:
        self.max_characters = max_characters
        self._deadline = time.monotonic() + time_limit_s
        self._bytes = MAX_BYTES
        self._weights: dict[int, tuple[Any, int]] = {}  # by id; the container is held, so that its id stays its own

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            raise SecurityError("the template takes too long")

    def room(self, characters: int) -> None:
        """Refuse what would be longer than a value may be."""
        if characters > self.max_characters:
            raise SecurityError(TOO_LONG)

    def items(self, count: int) -> None:
        """Refuse what would have more items than a container may have."""
        if count > MAX_ITEMS:
            raise SecurityError("the template makes too long a list")

    def measure(self, value: Any) -> Any:
        """Charge a new value and return it, unless it is too large to go on with."""
        if isinstance(value, (str, bytes)):
            if len(value) > self.max_characters:
                raise SecurityError(TOO_LONG)
            self._bytes -= sys.getsizeof(value)
            if self._bytes < 0:
                raise SecurityError(TOO_MUCH)
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise SecurityError("the template computes too large a number")
        elif isinstance(value, CONTAINERS):
            self.weigh(value)
        elif isinstance(value, types.GeneratorType):
            return self.drawn(value)
        return value

    def weigh(self, value: Any) -> int:
        """The characters and items of a value, written out."""
        if isinstance(value, (str, bytes)):
            return len(value) + 1
        if isinstance(value, CONTAINERS):
            known = self._weights.get(id(value))
            return self._weighed(value) if known is None else known[1]
        return 1

    def know(self, container: Any, weight: int) -> None:
        """Take a new container of known weight."""
        if weight > self.max_characters:
            raise SecurityError(TOO_LONG)
        self._charge(sys.getsizeof(container))
        self._weights[id(container)] = container, weight

    def ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, with a look at the clock before each."""
        for item in items:
            self.tick()
            yield item

    def drawn(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same for what a filter makes one by one: each is measured."""
        for count, item in enumerate(items):
            self.tick()
            self.items(count)
            yield self.measure(item)

    def texts(self, items: Iterable[Any], separator: str) -> list[str]:
        """The texts of items that are to be joined."""
        texts: list[str] = []
        length = 0
        for item in self.drawn(items):
            texts.append(item if isinstance(item, str) else self.measure(str(item)))
            length += len(texts[-1]) + len(separator)
            self.room(length - len(separator))
        return texts

    def _weighed(self, container: Any) -> int:
        self.items(len(container))
        weight, size = 1, sys.getsizeof(container)
        for item in itertools.chain.from_iterable(container.items()) if isinstance(container, dict) else container:
            if isinstance(item, (str, bytes)):
                weight += len(item) + 1
                size += sys.getsizeof(item)
            else:
                weight += self.weigh(item)
            if weight > self.max_characters:
                raise SecurityError(TOO_LONG)
        self._charge(size)
        self._weights[id(container)] = container, weight
        return weight

    def _charge(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise SecurityError(TOO_MUCH)
