"""Numbers as the wire shows them: a float32 in as few digits as tell it apart from its neighbours.

Knows no field.
"""

import math
import struct

_SINGLE = struct.Struct("<f")  # the native "f" makes infinity of what is too large
_SMALLEST_NORMAL = 2.0**-126  # below, a float32 holds fewer than six digits


def shortest(value: float | None) -> float | None:
    """The double with the fewest digits that rounds to the same float32 as `value`; None where JSON has no number."""
    if value is None or not math.isfinite(value):
        return None
    try:
        packed = _SINGLE.pack(value)
    except OverflowError:  # beyond float32's range, so infinite there
        return None
    single: float = _SINGLE.unpack(packed)[0]
    for digits in range(6 if abs(single) >= _SMALLEST_NORMAL else 1, 9):
        short = float(f"{single:.{digits}g}")
        if _SINGLE.pack(short) == packed:
            return short
    return float(f"{single:.9g}")
