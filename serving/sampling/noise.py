"""Gumbel noise that is a pure function of (seed, position, token id).

Knows no logits and keeps no state: there is no generator to advance, so batch mates, chunking, preemption and a
restart cannot move a draw.

The bits come from SplitMix64 used as a counter-based generator (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014): a row's key is the finaliser applied twice, to the seed and then to the position, and
the token id is the counter of the key's stream. torch has no unsigned 64-bit arithmetic, so int64 wraps around and the
logical shift is an arithmetic one with a mask.
"""

import torch

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_POSITION = 0xD1B54A32D192ED03
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def draw_key(seed: int, position: int) -> int:
    """The key of one draw as a signed 64-bit integer; `seed` counts modulo 2**64, `position` from 0."""
    key = _finalise((seed & _WORD) + _GOLDEN)
    return _signed(_finalise(key + (position + 1) * _POSITION))


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of tokens.

    Computed in float64 everywhere: so two devices differ by the last bits of a double, far below the logits' own
    rounding, and the tail reaches 36 above zero (float32 would end it at 16 and tie in it).

    Args:
        keys: [rows, 1] int64, from `draw_key`.
        token_ids: [rows, tokens] or [tokens] int64.

    Returns:
        [rows, tokens] float64, finite.
    """
    bits = token_ids * _signed(_GOLDEN) + keys
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_SECOND)
    bits = bits ^ _shift_right(bits, 31)
    # The upper 52 bits and a half: exact in a double, and neither 0 nor 1, so both logarithms are finite.
    uniform = _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _finalise(value: int) -> int:
    value &= _WORD
    value = ((value ^ (value >> 30)) * _FIRST) & _WORD
    value = ((value ^ (value >> 27)) * _SECOND) & _WORD
    return value ^ (value >> 31)


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
