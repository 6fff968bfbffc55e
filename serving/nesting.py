"""How deep a JSON value is nested, told without recursion.

Knows nobody who has a limit.
"""

from typing import Any


def is_deeper(value: Any, most: int) -> bool:
    """Whether more than `most` objects and arrays stand in each other."""
    level = [value]
    for _ in range(most + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return False
        level = [child for outer in level for child in (outer.values() if isinstance(outer, dict) else outer)]
    return True
