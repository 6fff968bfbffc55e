import itertools
import math

import pytest
import torch

from serving.plan import NewRow, Row
from serving.protocol import SamplingParams, Watermark
from serving.sampling.sampler import Sampler
from serving.sampling.watermark import favour

VOCAB = 512
CPU = torch.device("cpu")


def green(previous: int, gamma: float = 0.5) -> set[int]:
    """The list as the paper's authors compute it."""
    draw = torch.Generator()
    draw.manual_seed(15485863 * previous)
    return set(torch.randperm(VOCAB, generator=draw)[: int(VOCAB * gamma)].tolist())


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_green_ids_gain_delta_and_others_nothing(gamma):
    logits = torch.zeros(2, VOCAB)
    favour(logits, [7, 300], [Watermark(gamma, 1.5), Watermark(gamma, 3.0)])
    for line, previous, delta in zip(logits, (7, 300), (1.5, 3.0), strict=True):
        assert set(line.nonzero().flatten().tolist()) == green(previous, gamma)
        assert set(line.unique().tolist()) == {0.0, delta}


def generated(watermark: Watermark | None, count: int = 200) -> list[int]:
    sampler, draw = Sampler(VOCAB, CPU), torch.Generator().manual_seed(3)
    params = SamplingParams(do_sample=True, seed=11, watermark=watermark)
    token_ids = [5]
    sampler.start(NewRow(sequence_id=1, token_ids=token_ids, prompt_length=1, sampling=params))
    for position in range(count):
        row = Row(
            sequence_id=1, token_ids=token_ids[-1:], position=position, block_table=[1] * (count // 16 + 1), sample=True
        )
        choice = sampler.choose(torch.randn(1, VOCAB, generator=draw), [row])[0]
        token_ids.append(choice.token_id)
    return token_ids


def z_score(token_ids: list[int], gamma: float = 0.5) -> float:
    """The paper's test statistic: how many standard deviations more green tokens than chance gives."""
    pairs = list(itertools.pairwise(token_ids))
    hits = sum(token_id in green(previous, gamma) for previous, token_id in pairs)
    return (hits - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1 - gamma))


def test_the_detector_of_the_paper_finds_the_watermark_and_nothing_in_other_text():
    assert z_score(generated(Watermark(0.5, 2.0))) > 6
    assert abs(z_score(generated(None))) < 3


def test_logprobs_are_those_of_the_marked_logits():
    sampler, mark = Sampler(VOCAB, CPU), Watermark(0.5, 2.0)
    sampler.start(NewRow(sequence_id=1, token_ids=[9], prompt_length=1, sampling=SamplingParams(watermark=mark)))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    row = Row(sequence_id=1, token_ids=[9], position=0, block_table=[1], sample=True)
    choice = sampler.choose(logits, [row])[0]
    assert torch.equal(logits, before)
    favour(before, [9], [mark])
    assert choice.token_id == before.argmax().item()
    assert choice.logprob == pytest.approx(before.log_softmax(-1)[0, choice.token_id].item(), abs=1e-6)
