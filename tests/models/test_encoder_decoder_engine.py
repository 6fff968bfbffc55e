"""Encoder-decoders through the real engine and the real runner: greedy answers are transformers' own."""

import logging
import random

import pytest
import torch
from fakes import byte_tokenizer
from models.cases import ENCODER_DECODERS, FALLBACK_ENCODER_DECODERS, randomized

from serving.engine.engine import Engine
from serving.errors import ConfigurationError
from serving.plan import NewRow, Row, StepPlan
from serving.protocol import Request, SamplingParams, StopParams
from serving.runner import load
from serving.runner.frames import RunnerOptions
from serving.runner.load import load_runner
from serving.weights.model_config import ModelConfig

BLOCK_BYTES = 2 * 2 * 8 * 16 * 16 * 4  # of keys and values, layers, heads, head_dim, tokens, float32
SLOT_BYTES = 3 * BLOCK_BYTES  # of a text of 40 tokens


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    theirs = randomized(ENCODER_DECODERS["t5"])
    theirs.save_pretrained(directory)
    return theirs, directory


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bart")
    theirs = randomized(FALLBACK_ENCODER_DECODERS["bart"])
    theirs.save_pretrained(directory)
    return theirs, directory


def options(directory, **changes):
    given = {
        "device": "cpu", "dtype": "float32", "max_rows": 4, "max_step_tokens": 64, "max_input_tokens": 40,
        "max_total_tokens": 96, "kv_cache_bytes": 4 * (SLOT_BYTES + 3 * BLOCK_BYTES) + BLOCK_BYTES,
    }  # fmt: skip
    return RunnerOptions(model_dir=str(directory), **{**given, **changes})


def make_engine(runner):
    return Engine(
        runner, byte_tokenizer(), eos_token_ids=frozenset(), max_step_tokens=64, max_rows=4, prefix_caching=True
    )


def request(text, count, start=0):
    return Request(
        prompt_token_ids=[start],
        encoder_token_ids=text,
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=count),
    )


def generated(theirs, text, count):
    with torch.inference_mode():
        out = theirs.generate(
            torch.tensor([text]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None,
            forced_eos_token_id=None,
        )  # fmt: skip
    return out[0, 1:].tolist()


def texts(count, longest):
    rng = random.Random(longest)
    return [[rng.randrange(2, 131) for _ in range(rng.randint(1, longest))] for _ in range(count)]


class Running:
    """An engine at work, with all that it said."""

    def __init__(self, engine, requests):
        self.engine, self.ids, self.preempted, self.most_rows = engine, [[] for _ in requests], 0, 0
        for number, asked in enumerate(requests):
            engine.add(number, asked)

    def step(self):
        outputs, stats = self.engine.step()
        self.preempted += stats.preempted
        self.most_rows = max(self.most_rows, stats.rows)
        for output in outputs:
            assert output.error is None
            self.ids[output.request_id] += [token.id for token in output.tokens]

    def finish(self):
        while self.engine.has_work():
            self.step()
        return self.ids


def test_answers_together_are_transformers_own(t5):
    theirs, directory = t5
    asked = texts(11, 40)
    running = Running(make_engine(load_runner(options(directory))), [request(text, 20) for text in asked])
    assert running.finish() == [generated(theirs, text, 20) for text in asked]
    assert running.most_rows == 4


def test_answers_of_transformers_own_class_are_those_of_transformers(bart):
    theirs, directory = bart
    asked = texts(9, 40)
    running = Running(make_engine(load_runner(options(directory))), [request(text, 20, start=2) for text in asked])
    assert running.finish() == [generated(theirs, text, 20) for text in asked]
    assert running.most_rows == 4


def test_an_answer_goes_as_far_as_learned_positions_go(bart):
    theirs, directory = bart
    runner = load_runner(options(directory, max_input_tokens=None, max_total_tokens=None, kv_cache_bytes=64 << 20))
    (text,) = texts(1, 96)
    assert Running(make_engine(runner), [request(text, 95, start=2)]).finish() == [generated(theirs, text, 95)]


def test_answers_survive_a_lack_of_blocks(t5):
    theirs, directory = t5
    asked = texts(6, 15)
    running = Running(make_engine(load_runner(options(directory))), [request(text, 75) for text in asked])
    assert running.finish() == [generated(theirs, text, 75) for text in asked]
    assert running.preempted > 0


def test_answers_survive_a_new_runner(t5):
    theirs, directory = t5
    asked = texts(5, 40)
    engine = make_engine(load_runner(options(directory)))
    running = Running(engine, [request(text, 20) for text in asked])
    for _ in range(7):
        running.step()
    assert engine.restart(load_runner(options(directory))) == []
    assert running.finish() == [generated(theirs, text, 20) for text in asked]


def test_the_same_answer_again_comes_out_of_the_cache_and_that_to_another_text_does_not(t5):
    theirs, directory = t5
    text, other = texts(2, 40)
    engine = make_engine(load_runner(options(directory)))
    first = Running(engine, [request(text, 40)]).finish()[0]
    cached = []
    for number, asked in enumerate((text, other), 10):
        # What is written already is part of the prompt, as after a restart.
        engine.add(number, Request(
            prompt_token_ids=[0, *first[:35]], encoder_token_ids=asked, sampling=SamplingParams(),
            stop=StopParams(max_new_tokens=5),
        ))  # fmt: skip
        outputs, stats = engine.step()
        cached.append(stats.cached_tokens)
        with torch.inference_mode():
            want = theirs(
                input_ids=torch.tensor([asked]), decoder_input_ids=torch.tensor([[0, *first[:35]]])
            ).logits[0, -1]  # fmt: skip
        assert outputs[0].tokens[0].id == want.argmax()
        engine.abort(number)
    assert cached == [32, 0]


def test_the_prompt_of_an_answer_is_the_token_that_it_begins_with(t5):
    engine = make_engine(load_runner(options(t5[1])))
    engine.add(1, Request(
        prompt_token_ids=[0], encoder_token_ids=[5, 6], sampling=SamplingParams(prompt_logprobs=True),
        stop=StopParams(max_new_tokens=2),
    ))  # fmt: skip
    first, second = engine.step()[0] + engine.step()[0]
    assert [(token.id, token.logprob) for token in first.prompt] == [(0, None)]
    assert second.prompt == []


def test_facts_count_what_is_kept_of_texts(t5):
    _, directory = t5
    facts = load_runner(options(directory)).facts
    assert (facts.max_encoder_tokens, facts.max_position, facts.max_rows) == (40, 96, 4)
    assert facts.kv_bytes == facts.block_count * BLOCK_BYTES + 4 * SLOT_BYTES


def test_unsaid_limits_are_those_of_the_training(t5):
    _, directory = t5
    roomy = {"kv_cache_bytes": 64 << 20, "max_input_tokens": None}
    facts = load_runner(options(directory, **roomy, max_total_tokens=None)).facts
    assert (facts.max_encoder_tokens, facts.max_position) == (512, 1024)
    facts = load_runner(options(directory, **roomy, max_total_tokens=300)).facts
    assert (facts.max_encoder_tokens, facts.max_position) == (299, 300)


@pytest.mark.parametrize(
    ("said", "read", "written", "total"),
    [
        ((None, None), 96, 96, 192),
        ((40, None), 40, 96, 136),
        ((None, 80), 79, 80, 80),
        ((None, 150), 96, 96, 150),
        ((500, 1000), 96, 96, 192),
    ],
)
def test_learned_positions_bound_either_side(bart, said, read, written, total):
    _, directory = bart
    facts = load_runner(
        options(directory, kv_cache_bytes=64 << 20, max_input_tokens=said[0], max_total_tokens=said[1])
    ).facts
    assert (facts.max_encoder_tokens, facts.max_decoder_tokens, facts.max_position) == (read, written, total)


def test_too_little_memory_lets_fewer_in_and_none_is_refused(t5, caplog):
    _, directory = t5
    caplog.set_level(logging.INFO, "serving.runner")
    facts = load_runner(options(directory, kv_cache_bytes=2 * (SLOT_BYTES + 3 * BLOCK_BYTES) + BLOCK_BYTES)).facts
    assert facts.max_rows == 2
    assert facts.kv_bytes <= 2 * (SLOT_BYTES + 3 * BLOCK_BYTES) + BLOCK_BYTES
    assert "room for 2 requests at once" in caplog.text
    with pytest.raises(ConfigurationError, match="max_total_tokens=96"):
        load_runner(options(directory, kv_cache_bytes=SLOT_BYTES))


def test_float16_is_replaced_where_its_range_is_too_small(t5, monkeypatch, caplog):
    config = ModelConfig.load(t5[1])
    for narrow, computed in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, there=narrow: there)
        assert load._dtype("float16", config, torch.device("cuda")) == computed
    assert "t5 leaves the range of float16" in caplog.text


def test_slots_come_back(t5):
    _, directory = t5
    runner = load_runner(options(directory))
    for number in range(12):  # three times as many as there are
        new = NewRow(
            sequence_id=number, token_ids=[0], prompt_length=1, sampling=SamplingParams(), encoder_token_ids=[number]
        )
        row = Row(sequence_id=number, token_ids=[0], position=0, block_table=[1], sample=True)
        assert runner.execute(StepPlan(rows=[row], started=[new], finished=[number - 1])).rows[0].choice is not None
