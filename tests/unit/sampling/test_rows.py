"""What is remembered of a sequence, and that nothing is kept for rows that need nothing."""

import pytest
import torch

from serving.plan import NewRow
from serving.protocol import SamplingParams
from serving.sampling.rows import SamplingRows

CPU = torch.device("cpu")


def started(**params):
    rows = SamplingRows(16, CPU)
    rows.start(NewRow(sequence_id=4, token_ids=[1, 1, 2, 3, 3], prompt_length=3, sampling=SamplingParams(**params)))
    return rows


def test_counts_tell_the_prompt_from_the_output():
    row = started(presence_penalty=0.5)[4]
    row.remember(3)
    row.remember(15)
    seen, written = row.counts.tolist()
    assert {i: n for i, n in enumerate(seen) if n} == {1: 2, 2: 1, 3: 3, 15: 1}
    assert {i: n for i, n in enumerate(written) if n} == {3: 3, 15: 1}


def test_counts_exist_only_where_a_penalty_needs_them():
    row = started(do_sample=True, temperature=0.5, top_p=0.9, logit_bias={3: 1.0})[4]
    row.remember(3)
    assert row.counts is None


def test_a_bias_outside_the_vocabulary_is_left_out():
    ids, values = started(logit_bias={-1: 1.0, 3: 2.0, 16: 3.0})[4].bias
    assert (ids.tolist(), values.tolist()) == ([3], [2.0])
    assert started(logit_bias={99: 1.0})[4].plain


@pytest.mark.parametrize(
    "params",
    [
        {"do_sample": True},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"typical_p": 0.5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"relative_frequency_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"logit_bias": {1: 1.0}},
    ],
    ids=lambda params: next(iter(params)),
)
def test_every_parameter_leaves_the_plain_path(params):
    assert started()[4].plain
    assert not started(**params)[4].plain


def test_a_finished_sequence_is_forgotten():
    rows = started()
    rows.finish(4)
    rows.finish(4)
    assert len(rows) == 0
    with pytest.raises(KeyError):
        rows[4]
