import pytest

from serving.nesting import is_deeper


def nested(depth, leaf):
    for at in range(depth):
        leaf = [leaf, 1] if at % 2 else {"key": leaf}
    return leaf


@pytest.mark.parametrize(("depth", "leaf"), [(0, 1), (1, "text"), (5, None), (4, {}), (4, [])])
def test_every_object_and_array_counts_once(depth, leaf):
    value, containers = nested(depth, leaf), depth + isinstance(leaf, dict | list)
    assert not is_deeper(value, containers)
    assert containers == 0 or is_deeper(value, containers - 1)


def test_depth_far_beyond_any_recursion_limit():
    assert is_deeper(nested(100_000, 1), 128)
