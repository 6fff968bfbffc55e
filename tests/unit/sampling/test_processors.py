"""Each processor against the one that transformers has, or against its definition."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from serving.sampling import candidates, processors
from serving.sampling.candidates import Candidates

ROWS, VOCAB = 6, 700


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def column(value, rows=ROWS, dtype=torch.float32):
    return torch.full((rows, 1), value, dtype=dtype)


def scattered(kept: Candidates) -> torch.Tensor:
    return torch.full((len(kept.ids), VOCAB), -torch.inf).scatter(-1, kept.ids, kept.values)


def narrowed(logits, top_k=0, top_p=1.0, min_p=0.0, look=VOCAB):
    rows = len(logits)
    return candidates.narrow(
        candidates.largest(logits, look),
        candidates.weight(logits),
        column(top_k, rows, torch.int64),
        column(top_p, rows),
        column(min_p, rows),
    )


def test_repetition_penalty_is_transformers(logits):
    ids = torch.randint(0, VOCAB, (ROWS, 90), generator=torch.Generator().manual_seed(1))
    seen = torch.stack([torch.bincount(line, minlength=VOCAB) for line in ids]).int()
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    processors.repetition_penalty(logits, seen, column(1.3))
    assert torch.equal(logits, expected)


def test_relative_frequency_penalty_is_the_share_of_an_id(logits):
    before = logits.clone()
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.int32)
    seen[0, 5], seen[1, 6] = 3, 1
    processors.relative_frequency_penalty(logits, seen, column(12.0), column(2.0))
    assert logits[0, 5].item() == pytest.approx(before[0, 5].item() - 2.0 * 3 / 12)
    assert logits[1, 6].item() == pytest.approx(before[1, 6].item() - 2.0 * 1 / 12)
    assert torch.equal(logits[2:], before[2:])


def test_frequency_counts_and_presence_does_not(logits):
    written = torch.zeros(ROWS, VOCAB, dtype=torch.int32)
    written[0, 5] = 3
    frequent, present = logits.clone(), logits.clone()
    processors.frequency_penalty(frequent, written, column(0.5))
    processors.presence_penalty(present, written, column(0.5))
    assert frequent[0, 5].item() == pytest.approx(logits[0, 5].item() - 1.5)
    assert present[0, 5].item() == pytest.approx(logits[0, 5].item() - 0.5)
    assert torch.equal(frequent[1:], logits[1:])
    assert torch.equal(present[1:], logits[1:])


def test_parameters_that_mean_off_change_no_bit(logits):
    before = logits.clone()
    counts = torch.ones(ROWS, VOCAB, dtype=torch.int32)
    processors.repetition_penalty(logits, counts, column(1.0))
    processors.relative_frequency_penalty(logits, counts, column(9.0), column(0.0))
    processors.frequency_penalty(logits, counts, column(0.0))
    processors.presence_penalty(logits, counts, column(0.0))
    processors.define(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("value", [0.01, 0.7, 1.9])
def test_temperature_is_transformers_up_to_a_shift(logits, value):
    expected = TemperatureLogitsWarper(value)(None, logits).log_softmax(-1)
    processors.temperature(logits, column(value))
    torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1e-30, 1e-45, 5e-324])
def test_the_smallest_temperatures_give_the_argmax(logits, value):
    best = logits.argmax(-1)
    processors.temperature(logits, column(value))
    assert torch.equal(logits.argmax(-1), best)
    assert not bool(logits.isnan().any())
    assert bool((logits.softmax(-1).amax(-1) == 1).all())


def test_undefined_logits_become_defined():
    logits = torch.tensor([[torch.nan, 1.0, torch.inf, -torch.inf]])
    processors.define(logits)
    assert logits.tolist() == [[-torch.inf, 1.0, torch.finfo(torch.float32).max, -torch.inf]]


@pytest.mark.parametrize("top_k", [1, 2, 50, VOCAB, 10 * VOCAB])
def test_top_k_is_transformers(logits, top_k):
    expected = TopKLogitsWarper(top_k)(None, logits)
    kept, _ = narrowed(logits, top_k=min(top_k, VOCAB))
    assert torch.equal(scattered(kept), expected)


def test_top_k_keeps_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept, _ = narrowed(logits, top_k=2, look=6)
    assert kept.ids[0, kept.values[0].isfinite()].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("look", [64, VOCAB])
def test_top_p_is_transformers(logits, top_p, look):
    expected = TopPLogitsWarper(top_p)(None, logits)
    kept, enough = narrowed(logits, top_p=top_p, look=look)
    rows = enough | (look == VOCAB)
    assert torch.equal(scattered(kept)[rows], expected[rows])
    assert bool(rows.any()) or top_p > 0.9


def test_top_p_among_equals_takes_as_few_as_reach_it_and_low_ids_first():
    kept, _ = narrowed(torch.zeros(1, 8), top_p=0.5, look=8)
    assert kept.ids[0, kept.values[0].isfinite()].tolist() == [0, 1, 2, 3]


def test_top_p_looks_at_what_top_k_left():
    """After top_k = 2 the probabilities are 0.6 and 0.4, so 0.55 needs one token; of the whole row it needs three."""
    logits = torch.tensor([[0.3, 0.2, 0.19, 0.16, 0.15]]).log()
    both, _ = narrowed(logits, top_k=2, top_p=0.55, look=5)
    alone, _ = narrowed(logits, top_p=0.55, look=5)
    assert both.values.isfinite().sum().item() == 1
    assert alone.values.isfinite().sum().item() == 3


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_is_transformers(logits, min_p):
    expected = MinPLogitsWarper(min_p)(None, logits)
    kept, _ = narrowed(logits, min_p=min_p)
    assert torch.equal(scattered(kept), expected)


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.9, 0.99])
def test_typical_is_transformers(logits, mass):
    expected = TypicalLogitsWarper(mass)(None, logits)
    ids = torch.arange(VOCAB).expand_as(logits)
    assert torch.equal(candidates.typical(Candidates(logits, ids), column(mass)).values, expected)
    ordered = candidates.largest(logits, VOCAB)
    assert torch.equal(scattered(candidates.typical(ordered, column(mass))), expected)


@pytest.mark.parametrize("vocab", [2000, 2011, 32_000])
@pytest.mark.parametrize("ties", [False, True])
def test_blocks_find_the_largest_logits(vocab, ties):
    """The short cut through block maxima against a whole sort, and what it promises about its last value."""
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 5
    if ties:
        logits = logits.round()
    logits[0, vocab - 1] = 100.0
    found = candidates.largest(logits, 40)
    whole = candidates.largest(logits, vocab)
    last = found.values[0, -1]
    assert found.values.shape[-1] >= 40
    assert bool((found.values[0] >= last).all())
    certain = found.values[0] > last
    expected = whole.values[0] > last
    assert found.ids[0, certain].tolist() == whole.ids[0, expected].tolist()
    assert torch.equal(found.values[0, certain], whole.values[0, expected])


def test_a_look_that_was_too_short_says_so():
    flat = torch.zeros(1, VOCAB)
    assert narrowed(flat, top_p=0.5, look=64)[1].tolist() == [False]
    assert narrowed(flat, top_k=3, look=64)[1].tolist() == [False]
    assert narrowed(flat, top_k=3, top_p=0.1, look=64)[1].tolist() == [False]
    peaked = flat.clone()
    peaked[0, 9] = 30.0
    assert narrowed(peaked, top_p=0.5, look=64)[1].tolist() == [True]
    assert narrowed(peaked, top_k=65, top_p=0.5, look=64)[1].tolist() == [False]
