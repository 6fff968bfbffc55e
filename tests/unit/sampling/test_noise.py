"""Draws depend on (seed, position, token id) alone, and look random over each of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.sampling.noise import draw_key, gumbel

WORD = (1 << 64) - 1
SEEDS = st.integers(min_value=0, max_value=WORD)
EULER = 0.5772156649015329


def noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    return gumbel(torch.tensor([[draw_key(seed, position)]]), token_ids)[0]


def reference(seed: int, position: int, token_id: int) -> float:
    """The same in Python's exact integers."""

    def finalise(value: int) -> int:
        value &= WORD
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
        return value ^ (value >> 31)

    key = finalise(finalise(seed + 0x9E3779B97F4A7C15) + (position + 1) * 0xD1B54A32D192ED03)
    bits = finalise(key + token_id * 0x9E3779B97F4A7C15)
    return -math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52))


@given(SEEDS, st.integers(0, 1 << 20), st.integers(0, 300_000))
def test_int64_arithmetic_wraps_like_unsigned_words(seed, position, token_id):
    found = noise(seed, position, torch.tensor([token_id])).item()
    assert found == pytest.approx(reference(seed, position, token_id), rel=1e-12, abs=1e-12)


def test_the_function_never_changes():
    """Reproducible answers across releases: these numbers may not move without a note to users."""
    found = [
        noise(seed, position, torch.tensor([token])).item() for seed, position, token in [(0, 0, 0), (42, 7, 31999)]
    ]
    assert found == pytest.approx([reference(0, 0, 0), reference(42, 7, 31999)], rel=1e-12)
    assert [draw_key(0, 0), draw_key(WORD, 1 << 20)] == [FIRST_KEY, LAST_KEY]


FIRST_KEY = 3454618561189201622
LAST_KEY = 1302974534189213231


@given(SEEDS, st.integers(0, 100_000), st.data())
def test_one_tokens_noise_does_not_know_the_others(seed, position, data):
    ids = torch.arange(257)
    subset = torch.tensor(data.draw(st.lists(st.integers(0, 256), min_size=1, max_size=20)))
    assert torch.equal(noise(seed, position, ids)[subset], noise(seed, position, subset))


def test_rows_do_not_know_each_other():
    keys = torch.tensor([[draw_key(seed, seed % 5)] for seed in range(37)])
    together = gumbel(keys, torch.arange(1001))
    for row in range(37):
        assert torch.equal(together[row], gumbel(keys[row : row + 1], torch.arange(1001))[0])


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, WORD - 1, WORD])
def test_noise_has_gumbels_moments_for_every_seed(seed):
    sample = noise(seed, 3, torch.arange(200_000))
    assert bool(sample.isfinite().all())
    deviation = math.pi / math.sqrt(6)
    assert abs(sample.mean().item() - EULER) < 5 * deviation / math.sqrt(200_000)
    assert abs(sample.std().item() - deviation) < 0.02
    uniform = torch.exp(-torch.exp(-sample))
    counts = torch.histc(uniform, bins=64, min=0, max=1)
    chi_square = ((counts - 200_000 / 64) ** 2 / (200_000 / 64)).sum().item()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((first, second)))[0, 1].item()


@pytest.mark.parametrize("seed", [0, 1, 123_456_789, WORD - 1])
@pytest.mark.parametrize("position", [0, 1, 4095])
def test_neighbours_are_independent(seed, position):
    """Adjacent seeds, positions and ids are what real traffic has: none may show in another's draws."""
    ids = torch.arange(100_000)
    here = noise(seed, position, ids)
    bound = 5 / math.sqrt(100_000)
    assert abs(correlation(here, noise(seed + 1, position, ids))) < bound
    assert abs(correlation(here, noise(seed, position + 1, ids))) < bound
    assert abs(correlation(here, noise(seed + 1, position + 1, ids))) < bound
    assert abs(correlation(here, noise(seed ^ (1 << 63), position, ids))) < bound
    for lag in (1, 2, 64):
        assert abs(correlation(here[:-lag], here[lag:])) < bound
    assert abs(correlation(here[:-1], noise(seed, position + 1, ids)[1:])) < bound


def test_one_tokens_noise_is_random_along_positions_and_along_seeds():
    token = torch.tensor([17])
    for keys in ([draw_key(5, step) for step in range(50_000)], [draw_key(step, 5) for step in range(50_000)]):
        series = gumbel(torch.tensor(keys).unsqueeze(-1), token)[:, 0]
        assert abs(series.mean().item() - EULER) < 5 * math.pi / math.sqrt(6 * 50_000)
        assert abs(correlation(series[:-1], series[1:])) < 5 / math.sqrt(50_000)


def test_keys_do_not_collide():
    keys = {
        draw_key(seed, position) for seed in (*range(100), *(WORD - i for i in range(100))) for position in range(500)
    }
    assert len(keys) == 200 * 500
