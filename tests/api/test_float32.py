"""Floats are shown as the shortest digits that tell a float32 apart."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.schemas.float32 import shortest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.6196289, "-0.6196289"),
        (struct.unpack("f", struct.pack("f", -0.6196289))[0], "-0.6196289"),
        (struct.unpack("f", struct.pack("f", 0.1))[0], "0.1"),
        (16777216.0, "16777216.0"),
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1.401298464324817e-45, "1e-45"),
        (3.4028234663852886e38, "3.4028235e+38"),
    ],
)
def test_known_values(value, text):
    assert repr(shortest(value)) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 1e39, -1e300])
def test_what_json_cannot_say_is_null(value):
    assert shortest(value) is None


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_it_is_the_same_float32_and_no_shorter_digits_are(value):
    short = shortest(value)
    assert struct.pack("f", short) == struct.pack("f", value)
    digits = len(f"{short:.17g}".split("e")[0].replace(".", "").replace("-", "").strip("0")) if short else 1
    own = len(repr(short).split("e")[0].replace(".", "").replace("-", "").strip("0")) or 1
    assert own <= 9
    if own > 1:
        fewer = float(f"{value:.{own - 1}g}")
        assert abs(fewer) > 3.4028234663852886e38 or struct.pack("f", fewer) != struct.pack("f", value)
    assert digits >= own
