"""Which LoRA adapters there are, by the names that requests call them.

Knows no file and no device; the hub's thread alone changes it, other threads may read.
"""

import itertools
import logging
import time
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from serving.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdaptersUnsupported,
    NoRoomForAdapter,
    RequestError,
)

log = logging.getLogger(__name__)


class Adapter(Struct, frozen=True, kw_only=True):
    """One adapter.

    Attributes:
        number: the device's name for it, at least 1; never another's.
        place: where it came from, as an operator or a request said it.
        created: seconds since 1970.
        loaded: whether requests may have it.
    """

    number: int
    name: str
    place: str
    created: int
    loaded: bool = False


class Adapters:
    """Owns the names.

    Args:
        room: adapters that there may be at a time.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._numbers = itertools.count(1)
        self._adapters: Mapping[str, Adapter] = {}  # replaced and never changed, so that any thread may read it

    def claims(self, name: str) -> bool:
        """Whether a name has to be an adapter's: requests may have some, or one with this name is on its way."""
        return name in self._adapters or any(adapter.loaded for adapter in self._adapters.values())

    def all(self) -> list[Adapter]:
        """Those that requests may have, in the order of their coming."""
        return [adapter for adapter in self._adapters.values() if adapter.loaded]

    def find(self, name: str) -> Adapter:
        """A loaded one. Raises AdapterNotFound."""
        adapter = self._adapters.get(name)
        if adapter is None or not adapter.loaded:
            raise AdapterNotFound(name)
        return adapter

    def number_of(self, name: str) -> int | None:
        """A loaded one's number; None where there is none of the name."""
        adapter = self._adapters.get(name)
        return adapter.number if adapter is not None and adapter.loaded else None

    def known(self, name: str, place: str) -> Adapter | None:
        """The adapter that was begun or loaded before; None where it could be begun now. Raises as `begin`."""
        if not self._room:
            raise AdaptersUnsupported
        found = self._adapters.get(name)
        if found is not None and found.place != place:
            raise AdapterConflict(name)
        if found is None and len(self._adapters) >= self._room:
            raise NoRoomForAdapter(f"All places for adapters are taken ({self._room}): unload one")
        return found

    def begin(self, name: str, place: str) -> Adapter:
        """Give a name to an adapter that is going to be loaded, or find the one that was begun or loaded before.

        Raises:
            AdaptersUnsupported: there is no room for any.
            AdapterConflict: another one has the name.
            NoRoomForAdapter: there are as many as there may be.
        """
        found = self.known(name, place)
        if found is not None:
            return found
        adapter = Adapter(number=next(self._numbers), name=name, place=place, created=int(time.time()))
        self._adapters = {**self._adapters, name: adapter}
        return adapter

    def finish(self, adapter: Adapter) -> bool:
        """It is loaded. Returns whether it is still wanted; one that was removed meanwhile stays so."""
        if not self._is_known(adapter):
            return False
        self._adapters = {**self._adapters, adapter.name: msgspec.structs.replace(adapter, loaded=True)}
        return True

    def abandon(self, adapter: Adapter) -> None:
        """It cannot be loaded."""
        if self._is_known(adapter):
            self._remove(adapter.name)

    def remove(self, name: str) -> Adapter:
        """Take a name away, even from one that is on its way. Raises AdapterNotFound."""
        adapter = self._adapters.get(name)
        if adapter is None:
            raise AdapterNotFound(name)
        self._remove(name)
        return adapter

    def lose(self, number: int, error: RequestError) -> None:
        """The device does not have it any more."""
        for adapter in self._adapters.values():
            if adapter.number == number:
                log.error("The adapter %s is lost: %s", adapter.name, error)
                self._remove(adapter.name)
                return

    def _is_known(self, adapter: Adapter) -> bool:
        known = self._adapters.get(adapter.name)
        return known is not None and known.number == adapter.number

    def _remove(self, name: str) -> None:
        self._adapters = {known: adapter for known, adapter in self._adapters.items() if known != name}
