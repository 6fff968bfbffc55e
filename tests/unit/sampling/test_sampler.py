"""The sampler against a slow, plain reference, and the promise that batch mates never matter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.plan import NewRow, Row
from serving.protocol import SamplingParams
from serving.sampling.noise import draw_key, gumbel
from serving.sampling.sampler import Sampler, raw_logprobs

VOCAB = 1100
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU found")],
    ),
]


def new_row(sequence_id, params, tokens=(1, 2, 2, 3), prompt_length=2):
    return NewRow(sequence_id=sequence_id, token_ids=list(tokens), prompt_length=prompt_length, sampling=params)


def row(sequence_id, length=4):
    return Row(sequence_id=sequence_id, token_ids=[0], position=length - 1, block_table=[], sample=True)


def choose(logits, *asked, tokens=(1, 2, 2, 3), length=4):
    sampler = Sampler(logits.shape[-1], logits.device)
    for index, params in enumerate(asked):
        sampler.start(new_row(index, params, tokens))
    return sampler.choose(logits, [row(index, length) for index in range(len(asked))])


def random_logits(rows, seed=0, vocab=VOCAB, scale=4.0, device="cpu"):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def random_params(dice: random.Random) -> SamplingParams:
    def sometimes(value, otherwise):
        return value if dice.random() < 0.4 else otherwise

    return SamplingParams(
        do_sample=dice.random() < 0.7,
        seed=dice.choice([0, 1, 2**63, 2**64 - 1, dice.getrandbits(64)]),
        temperature=sometimes(dice.choice([0.2, 0.7, 1.3]), 1.0),
        top_k=sometimes(dice.choice([1, 5, 40, 700, 2000]), 0),
        top_p=sometimes(dice.choice([0.05, 0.5, 0.9, 0.999]), 1.0),
        typical_p=sometimes(dice.choice([0.2, 0.95]), 1.0),
        min_p=sometimes(dice.choice([0.01, 0.3]), 0.0),
        repetition_penalty=sometimes(dice.choice([0.8, 1.2]), 1.0),
        relative_frequency_penalty=sometimes(dice.choice([-1.0, 2.0]), 0.0),
        frequency_penalty=sometimes(dice.choice([-0.5, 1.0]), 0.0),
        presence_penalty=sometimes(dice.choice([-0.5, 1.0]), 0.0),
        logit_bias=sometimes({3: 5.0, 9: -100.0, 700: 2.5}, {}),
        top_n_tokens=sometimes(4, 0),
    )


def reference(logits, params, tokens, prompt_length):
    """Processed log probabilities of one row, in double precision and the order that the contract gives."""
    x = penalized(logits.double().tolist(), params, tokens, tokens[prompt_length:])
    x = [value / params.temperature for value in x]
    if params.top_k:
        kth = sorted(x, reverse=True)[min(params.top_k, len(x)) - 1]
        x = [value if value >= kth else -math.inf for value in x]
    if params.top_p < 1:
        x = nucleus(x, params.top_p)
    if params.min_p:
        p = softmax(x)
        x = [value if p[token] >= params.min_p * max(p) else -math.inf for token, value in enumerate(x)]
    if params.typical_p < 1:
        x = typical(x, params.typical_p)
    return [math.log(value) if value else -math.inf for value in softmax(x)]


def penalized(x, params, tokens, output):
    for token, value in params.logit_bias.items():
        x[token] += value
    for token in set(tokens):
        x[token] = x[token] * params.repetition_penalty if x[token] < 0 else x[token] / params.repetition_penalty
    for token in set(tokens):
        x[token] -= params.relative_frequency_penalty * tokens.count(token) / len(tokens)
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def nucleus(x, top_p):
    p = softmax(x)
    cumulative = 0.0
    for token in sorted(range(len(x)), key=lambda token: (p[token], -token))[:-1]:
        cumulative += p[token]
        if cumulative <= 1 - top_p:
            x[token] = -math.inf
    return x


def typical(x, mass):
    p = softmax(x)
    entropy = -sum(value * math.log(value) for value in p if value)
    distance = [abs(-math.log(value) - entropy) if value else math.inf for value in p]
    cumulative, bound = 0.0, math.inf
    for token in sorted(range(len(x)), key=lambda token: distance[token]):
        cumulative += p[token]
        bound = distance[token]
        if cumulative >= mass:
            break
    return [value if distance[token] <= bound else -math.inf for token, value in enumerate(x)]


def softmax(x):
    best = max(x)
    weights = [math.exp(value - best) for value in x]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@pytest.mark.parametrize("device", DEVICES)
def test_processors_in_the_contracts_order(device):
    """Every combination of parameters, against the slow reference: the choice, its logprob, the alternatives."""
    dice = random.Random(5)
    tokens, prompt_length = [3, 9, 9, 700, 3, 3, 12], 3
    asked = [random_params(dice) for _ in range(60)]
    logits = random_logits(60, seed=11, device=device)
    sampler = Sampler(VOCAB, logits.device)
    for index, params in enumerate(asked):
        sampler.start(new_row(index, params, tokens, prompt_length))
    choices = sampler.choose(logits, [row(index, len(tokens)) for index in range(60)])
    for line, params, choice in zip(logits, asked, choices, strict=True):
        expected = torch.tensor(reference(line, params, tokens, prompt_length), dtype=torch.float64)
        scores = expected
        if params.do_sample:
            key = torch.tensor([[draw_key(params.seed, len(tokens))]])
            scores = expected + gumbel(key, torch.arange(VOCAB))[0]
        assert choice.token_id == scores.argmax().item(), params
        assert choice.logprob == pytest.approx(expected[choice.token_id].item(), abs=2e-4), params
        if params.top_n_tokens:
            count = min(4, int(expected.isfinite().sum()))
            best = expected.topk(count)
            assert [token for token, _ in choice.top] == best.indices.tolist(), params
            assert [logprob for _, logprob in choice.top] == pytest.approx(best.values.tolist(), abs=2e-4), params
        else:
            assert choice.top == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [VOCAB, 8003])
def test_a_row_alone_is_bit_equal_to_the_row_in_any_batch(device, vocab):
    dice = random.Random(vocab)
    asked = [SamplingParams(top_n_tokens=index % 3) if index % 4 == 0 else random_params(dice) for index in range(48)]
    logits = random_logits(48, seed=2, vocab=vocab, device=device)
    alone = [choose(logits[index : index + 1], params)[0] for index, params in enumerate(asked)]
    for trial in range(4):
        order = random.Random(trial).sample(range(48), 48 - 11 * trial)
        assert choose(logits[order], *(asked[index] for index in order)) == [alone[index] for index in order]


def test_the_callers_logits_are_left_alone():
    dice = random.Random(0)
    logits = random_logits(30)
    before = logits.clone()
    choose(logits, *(random_params(dice) for _ in range(30)))
    assert torch.equal(logits, before)


def test_a_restart_in_the_middle_changes_nothing():
    """The same sequence, decoded through, or moved to a new sampler after ten tokens: the same ids and logprobs."""
    params = SamplingParams(
        do_sample=True,
        seed=9,
        top_p=0.95,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        relative_frequency_penalty=1.0,
    )
    steps = random_logits(20, seed=4)

    def decode(sampler, tokens, start, stop):
        choices = []
        for step in range(start, stop):
            [choice] = sampler.choose(steps[step : step + 1], [row(7, len(tokens))])
            tokens.append(choice.token_id)
            choices.append(choice)
        return choices

    sampler, tokens = Sampler(VOCAB, torch.device("cpu")), [5, 6, 5]
    sampler.start(new_row(7, params, tokens, 3))
    through = decode(sampler, tokens, 0, 20)
    first, tokens = Sampler(VOCAB, torch.device("cpu")), [5, 6, 5]
    first.start(new_row(7, params, tokens, 3))
    moved = decode(first, tokens, 0, 10)
    second = Sampler(VOCAB, torch.device("cpu"))
    second.start(new_row(7, params, tokens, 3))
    assert moved + decode(second, tokens, 10, 20) == through


def test_a_chunk_and_a_single_token_that_end_at_the_same_place_draw_the_same():
    logits = random_logits(1)
    sampler = Sampler(VOCAB, torch.device("cpu"))
    sampler.start(new_row(1, SamplingParams(do_sample=True, seed=3)))
    one = Row(sequence_id=1, token_ids=[4], position=9, block_table=[], sample=True)
    chunk = Row(sequence_id=1, token_ids=[4] * 8, position=2, block_table=[], sample=True)
    assert sampler.choose(logits, [one]) == sampler.choose(logits, [chunk])


def test_a_second_start_replaces_the_first():
    logits = random_logits(1)
    sampler = Sampler(VOCAB, torch.device("cpu"))
    sampler.start(new_row(0, SamplingParams(logit_bias={5: 100.0})))
    assert sampler.choose(logits, [row(0)])[0].token_id == 5
    sampler.start(new_row(0, SamplingParams(logit_bias={6: 100.0})))
    assert sampler.choose(logits, [row(0)])[0].token_id == 6
    sampler.finish(0)
    with pytest.raises(KeyError):
        sampler.choose(logits, [row(0)])


def test_chosen_tokens_are_counted():
    """A penalty of the output grows with every choice until another token wins."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 8], logits[0, 9] = 2.5, 1.0
    sampler = Sampler(VOCAB, torch.device("cpu"))
    sampler.start(new_row(0, SamplingParams(frequency_penalty=1.0), tokens=[8, 8, 8], prompt_length=3))
    assert [sampler.choose(logits, [row(0)])[0].token_id for _ in range(5)] == [8, 8, 9, 8, 0]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(do_sample=True), SamplingParams(do_sample=True, temperature=0.8, top_k=6, top_p=0.97)],
    ids=["open", "narrowed"],
)
@pytest.mark.parametrize("along", ["seed", "position"])
def test_draws_follow_the_softmax(params, along):
    """Chi-square over 6,000 draws of ten tokens, along seeds and along positions."""
    logits = random_logits(1, seed=8, vocab=10, scale=1.0)
    draws = 6_000
    sampler = Sampler(10, torch.device("cpu"))
    counts = [0] * 10
    for index in range(0, draws, 500):
        for place in range(500):
            seed = index + place if along == "seed" else 77
            asked = SamplingParams(
                do_sample=True, seed=seed, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p
            )
            sampler.start(new_row(place, asked))
        rows = [row(place, 4 if along == "seed" else 4 + index + place) for place in range(500)]
        for choice in sampler.choose(logits.expand(500, 10), rows):
            counts[choice.token_id] += 1
    probabilities = [math.exp(value) for value in reference(logits[0], params, [1, 2, 2, 3], 2)]
    assert all(count == 0 for count, p in zip(counts, probabilities, strict=True) if p == 0)
    kept = [(count, p * draws) for count, p in zip(counts, probabilities, strict=True) if p]
    degrees = len(kept) - 1
    assert sum((count - mean) ** 2 / mean for count, mean in kept) < degrees + 5 * math.sqrt(2 * degrees)


@given(
    st.integers(0, 2**64 - 1), st.floats(0.01, 2.0), st.integers(0, 20), st.floats(0.01, 1.0), st.integers(0, 10_000)
)
@settings(max_examples=60, deadline=None)
def test_a_draw_never_leaves_what_the_filters_keep(seed, temperature, top_k, top_p, number):
    logits = random_logits(1, seed=number, vocab=300)
    params = SamplingParams(do_sample=True, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    [choice] = choose(logits, params)
    p = torch.softmax(logits[0].double() / temperature, -1)
    better = p > p[choice.token_id]
    assert top_k == 0 or int(better.sum()) < top_k
    if top_k == 0:
        assert float(p[better].sum()) < top_p + 1e-5
    assert math.isfinite(choice.logprob)
    assert choice.logprob <= 0


def test_top_k_of_one_is_certain():
    [choice] = choose(random_logits(1), SamplingParams(do_sample=True, top_k=1, top_n_tokens=5))
    assert choice.logprob == 0.0
    assert math.copysign(1, choice.logprob) == 1
    assert choice.top == [(choice.token_id, 0.0)]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(presence_penalty=1.0)], ids=["plain", "edited"])
@pytest.mark.parametrize("vocab", [3, 300, 1024, 1030])
def test_the_lowest_id_wins_a_tie(params, vocab):
    for places in ([0, vocab - 1], [vocab - 2, vocab - 1], [1, vocab // 2]):
        logits = random_logits(1, vocab=vocab).clamp(max=9.0)
        logits[0, places] = 10.0
        assert choose(logits, params, tokens=(0,), length=1)[0].token_id == min(places)


def test_greedy_is_the_argmax_at_every_place():
    for vocab in (511, 512, 700, 1024):
        logits = random_logits(64, seed=vocab, vocab=vocab)
        logits[torch.arange(64), torch.arange(64) * (vocab - 1) // 63] = 50.0
        choices = choose(logits, *[SamplingParams()] * 64)
        assert [choice.token_id for choice in choices] == logits.argmax(-1).tolist()
        expected = logits.double().log_softmax(-1).amax(-1).tolist()
        assert [choice.logprob for choice in choices] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "params", [SamplingParams(top_n_tokens=2), SamplingParams(top_n_tokens=2, temperature=0.5)], ids=["plain", "edited"]
)
def test_ties_give_more_alternatives_than_were_asked_for_but_not_without_end(params):
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 4.0
    logits[0, [90, 91, 92]] = 2.0
    [some] = choose(logits, params)
    assert [token for token, _ in some.top] == [5, 90, 91, 92]
    [many] = choose(torch.zeros(1, VOCAB), params)
    assert [token for token, _ in many.top] == list(range(8))
    assert [logprob for _, logprob in many.top] == pytest.approx([-math.log(VOCAB)] * 8, abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_n_tokens=3),
        SamplingParams(do_sample=True, seed=1),
        SamplingParams(do_sample=True, top_p=0.9, temperature=0.7),
        SamplingParams(do_sample=True, top_k=5, typical_p=0.9, repetition_penalty=1.1),
    ],
)
def test_a_row_of_nonsense_harms_nobody(params):
    """NaN counts as minus infinity; a row without finite logits chooses id 0; its batch mates notice nothing."""
    logits = random_logits(5, seed=6)
    clean = choose(logits, *[params] * 5)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, :4] = torch.nan
    logits[3, 4:] = -50.0
    logits[3, 17] = 3.0
    choices = choose(logits, *[params] * 5)
    assert [choices[0], choices[4]] == [clean[0], clean[4]]
    for index in (1, 2):
        assert choices[index].token_id == 0
        assert choices[index].logprob == -math.inf
        assert choices[index].top == []
    assert choices[3].token_id == 17
    logits[2, 40] = torch.inf
    infinite = choose(logits, *[params] * 5)[2]
    assert (infinite.token_id, infinite.logprob) == (40, 0.0)


def test_prompt_logprobs_are_the_models_own():
    logits = random_logits(150, seed=1)
    ids = torch.arange(150)
    expected = logits.double().log_softmax(-1)[ids, ids].tolist()
    assert raw_logprobs(logits, ids) == pytest.approx(expected, abs=1e-5)
    assert raw_logprobs(logits[:70], ids[:70]) == raw_logprobs(logits, ids)[:70]
    assert raw_logprobs(logits[:0], ids[:0]) == []
    assert raw_logprobs(logits.bfloat16(), ids) == pytest.approx(expected, abs=0.1)
