"""The device's LoRA adapters as the engine knows them: which are there, which may go, which a new device has to get.

Knows no request and no weight: an adapter is a number and a directory.
"""

from collections.abc import Collection
from dataclasses import dataclass

from serving.errors import NoRoomForAdapter
from serving.plan import NewAdapter

MAX_DEATHS = 2  # of the device while it loads one adapter, until that is given up


@dataclass(slots=True)
class _Adapter:
    """One of them; `deaths` counts those of the device while it loaded it."""

    directory: str
    on_device: bool = False
    leaving: bool = False
    deaths: int = 0


class DeviceAdapters:
    """The adapters that there are.

    Args:
        most: how many the device has room for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._adapters: dict[int, _Adapter] = {}

    def has(self, number: int) -> bool:
        """Whether sequences can be computed with it; 0 is the model as it is."""
        return number == 0 or number in self._adapters

    def accepts(self, number: int) -> bool:
        """Whether new sequences may have it."""
        return number == 0 or (number in self._adapters and not self._adapters[number].leaving)

    def add(self, number: int, directory: str, used: Collection[int]) -> None:
        """Note an adapter that the device shall load.

        Args:
            used: the numbers that sequences have.

        Raises:
            NoRoomForAdapter: there are as many, some of which may only be there for running sequences.
        """
        staying = [known for known, adapter in self._adapters.items() if not adapter.leaving or known in used]
        if len(staying) >= self._most:
            raise NoRoomForAdapter(
                "All places for adapters are taken, also by unloaded ones that requests still use: try again later"
            )
        self._adapters[number] = _Adapter(directory)

    def drop(self, number: int) -> None:
        """Take it from new sequences; it stays for those that have it. Unknown ones are ignored: they were lost."""
        if number in self._adapters:
            self._adapters[number].leaving = True

    def take_unused(self, used: Collection[int]) -> list[int]:
        """Forget those that are leaving and that nobody uses; returns the numbers that the device has to forget."""
        going = {
            number: adapter for number, adapter in self._adapters.items() if adapter.leaving and number not in used
        }
        for number in going:
            del self._adapters[number]
        return [number for number, adapter in going.items() if adapter.on_device]

    def missing(self) -> list[NewAdapter]:
        """Those that the device does not have."""
        return [
            NewAdapter(number, adapter.directory) for number, adapter in self._adapters.items() if not adapter.on_device
        ]

    def arrived(self, number: int) -> None:
        """The device has it."""
        self._adapters[number].on_device = True
        self._adapters[number].deaths = 0

    def refused(self, number: int) -> None:
        """The device does not want it."""
        del self._adapters[number]

    def died(self, number: int) -> bool:
        """The device died while it loaded it. Returns whether that has happened too often: it is forgotten then."""
        adapter = self._adapters[number]
        adapter.deaths += 1
        if adapter.deaths < MAX_DEATHS:
            return False
        del self._adapters[number]
        return True

    def forget_device(self) -> None:
        """Another device, which has none of them."""
        for adapter in self._adapters.values():
            adapter.on_device = False
