"""The names of adapters: given, found, taken away, never given to two."""

import pytest

from serving.errors import AdapterConflict, AdapterNotFound, AdapterRefused, AdaptersUnsupported, NoRoomForAdapter
from serving.validation.adapters import Adapters


def test_a_name_is_found_once_its_adapter_is_loaded():
    adapters = Adapters(room=2)
    assert not adapters.claims("french")
    begun = adapters.begin("french", "/fr")
    assert adapters.claims("french")
    assert not adapters.claims("german")
    assert adapters.number_of("french") is None
    assert adapters.all() == []
    with pytest.raises(AdapterNotFound):
        adapters.find("french")
    assert adapters.finish(begun)
    assert adapters.claims("german")
    assert adapters.number_of("french") == adapters.find("french").number == begun.number == 1
    assert [adapter.name for adapter in adapters.all()] == ["french"]


def test_no_number_is_given_twice():
    adapters = Adapters(room=1)
    numbers = []
    for _ in range(3):
        numbers.append(adapters.begin("french", "/fr").number)
        adapters.remove("french")
    assert numbers == [1, 2, 3]


def test_the_same_is_found_again_and_another_place_is_a_conflict():
    adapters = Adapters(room=1)
    begun = adapters.begin("french", "/fr")
    assert adapters.begin("french", "/fr") == begun
    with pytest.raises(AdapterConflict):
        adapters.begin("french", "/other")


def test_the_room_counts_what_is_on_its_way():
    adapters = Adapters(room=1)
    begun = adapters.begin("french", "/fr")
    with pytest.raises(
        NoRoomForAdapter, match=r"are taken \(1\): unload one, or start the server with a larger --max-lora-adapters"
    ):
        adapters.begin("german", "/de")
    adapters.abandon(begun)
    adapters.begin("german", "/de")
    with pytest.raises(AdaptersUnsupported):
        Adapters(room=0).begin("french", "/fr")


def test_what_was_removed_on_its_way_does_not_come_back_and_harms_no_successor():
    adapters = Adapters(room=1)
    old = adapters.begin("french", "/fr")
    adapters.remove("french")
    adapters.finish(old)
    assert not adapters.claims("french")
    new = adapters.begin("french", "/fr")
    adapters.abandon(old)
    adapters.finish(old)
    assert adapters.number_of("french") is None
    adapters.finish(new)
    assert adapters.number_of("french") == new.number


def test_one_that_the_device_lost_is_gone():
    adapters = Adapters(room=2)
    for name in ("french", "german"):
        adapters.finish(adapters.begin(name, f"/{name}"))
    adapters.lose(1, AdapterRefused("it changed"))
    adapters.lose(9, AdapterRefused("nobody's"))
    assert [adapter.name for adapter in adapters.all()] == ["german"]
