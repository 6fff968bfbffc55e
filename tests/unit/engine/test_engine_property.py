"""Whatever happens around a request, its answer is that of the request alone on a huge device."""

import math
import os
import random

import pytest
import tokenizers
from fakes import FakeRunner
from tokenizers import decoders, models

from serving.engine.engine import Engine
from serving.errors import NoRoomForAdapter, RunnerDied
from serving.protocol import Request, SamplingParams, Session, StopParams
from serving.tokenizer import Tokenizer

pytestmark = pytest.mark.soak
SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
SCENARIOS_PER_CASE = max(1, round(40 * SCALE))
EOS = 0
# Two special tokens, some letters, and the two halves of "é" in a byte-level alphabet.
VOCABULARY = ["</s>", "<x>", "a", "b", "c", "d", "ab", "Ġ", "Ã", "©"]
SESSIONS = [Session("a", math.inf), Session("b", math.inf), Session("c", math.inf), Session("over", 0.0)]
STOPS = ["aa", "ab", "bc", "abc", "cab", "d ", "é", "dd", "<x>", "b<x>"]


def make_tokenizer():
    vocab = {token: token_id for token_id, token in enumerate(VOCABULARY)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<x>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


TOKENIZER = make_tokenizer()


def make_engine(runner, **options):
    return Engine(
        runner,
        TOKENIZER,
        eos_token_ids=frozenset({EOS}),
        max_step_tokens=options.get("max_step_tokens", 10**6),
        max_rows=options.get("max_rows", 64),
        prefix_caching=options.get("prefix_caching", True),
        lease_share=options.get("lease_share", 0.0),
        max_adapters=options.get("max_adapters", 1),
    )


def facts(outputs):
    """All of an answer that must not depend on what happens around it."""
    tokens = [token for output in outputs for token in output.tokens]
    finish = next((output.finish for output in outputs if output.finish), None)
    return {
        "tokens": tokens,
        "prompt": outputs[0].prompt,
        "text": "".join(output.text for output in outputs),
        "finish": finish and (finish.reason, finish.text, finish.generated_tokens),
    }


def alone(request):
    engine = make_engine(FakeRunner(len(VOCABULARY), block_size=64, block_count=8, max_step_tokens=512))
    if request.adapter:
        engine.load_adapter(request.adapter, f"/{request.adapter}")
    engine.add(0, request)
    outputs = []
    while engine.has_work():
        outputs += engine.step()[0]
    return facts(outputs)


class Scenario:
    """One server's life: its size, its clients and its accidents, all from one seed."""

    def __init__(self, seed, *, deaths):
        self.random = random.Random(seed)
        self.block_size = self.random.randint(1, 5)
        self.block_count = self.random.randint(4, 30)
        self.limits = {
            "max_step_tokens": self.random.choice([1, 2, 3, 7, 16, 64]),
            "max_rows": self.random.randint(1, 6),
            "prefix_caching": self.random.random() < 0.8,
            "lease_share": self.random.choice([0.0, 0.3, 1.0]),
            "max_adapters": self.random.randint(0, 3),
        }
        self.adapters = []
        self.loaded = self.unloaded = 0
        self.deaths_left = self.random.randint(1, 4) if deaths else 0
        self.runner = self.make_runner()
        self.engine = make_engine(self.runner, **self.limits)
        self.requests = {}
        self.outputs = {}
        self.aborted = set()
        self.texts = [[self.random.randrange(2, len(VOCABULARY)) for _ in range(6)]]
        self.preempted = self.cached = self.leased = 0
        self.lost = {}

    def make_runner(self):
        die_after = None
        if self.deaths_left:
            self.deaths_left -= 1
            die_after = self.random.randint(0, 12)
        return FakeRunner(
            len(VOCABULARY),
            block_size=self.block_size,
            block_count=self.block_count,
            max_step_tokens=64,
            die_after=die_after,
            max_rows=self.limits["max_rows"],
            max_adapters=self.limits["max_adapters"],
        )

    def change_adapters(self):
        """Load one, or drop one that running requests may use."""
        if self.adapters and self.random.random() < 0.5:
            self.engine.drop_adapter(self.adapters.pop(self.random.randrange(len(self.adapters))))
            self.unloaded += 1
            return
        number = self.loaded + 1
        try:
            self.engine.load_adapter(number, f"/{number}")
        except NoRoomForAdapter:
            return
        except RunnerDied:
            self.restart()
        self.loaded = number
        self.adapters.append(number)
        self.adapters = [each for each in self.adapters if self.engine.has_adapter(each)]

    def restart(self):
        while True:
            self.runner = self.make_runner()
            try:
                self.keep(self.engine.restart(self.runner))
                break
            except RunnerDied:
                continue
        self.lost |= self.engine.take_lost_adapters()
        self.adapters = [each for each in self.adapters if self.engine.has_adapter(each)]

    def make_request(self):
        # A prompt that begins like an earlier text, its answer included, makes shared blocks.
        base = self.random.choice(self.texts)
        prompt = base[: self.random.randint(1, len(base))]
        prompt = prompt + [self.random.randrange(1, len(VOCABULARY)) for _ in range(self.random.randint(0, 6))]
        read = self.random.choice([[], [], [5], [5, 6]])
        stops = tuple(self.random.sample(STOPS, self.random.choice([0, 0, 1, 2])))
        return Request(
            prompt_token_ids=prompt[:40],
            encoder_token_ids=read,
            sampling=SamplingParams(
                prompt_logprobs=self.random.random() < 0.2, top_n_tokens=self.random.choice([0, 0, 2])
            ),
            stop=StopParams(
                max_new_tokens=self.random.randint(1, 20),
                stop_strings=stops,
                stop_token_ids=self.random.choice([(), (3,)]),
                ignore_eos=self.random.random() < 0.5,
                keep_stop_text=self.random.random() < 0.5,
            ),
            adapter=self.random.choice([0, 0, *self.adapters]),
            cache_salt=self.random.choice(["", "", "tenant"]),
            session=self.random.choice([None, *SESSIONS]),
        )

    def step(self):
        try:
            outputs, stats = self.engine.step()
            self.preempted += stats.preempted
            self.cached += stats.cached_tokens
            leased = stats.blocks_leased
            assert leased <= self.limits["lease_share"] * (self.block_count - 1)
            self.leased += leased
            self.keep(outputs)
        except RunnerDied:
            self.restart()

    def keep(self, outputs):
        for output in outputs:
            assert output.request_id not in self.aborted, "an output after an abort"
            earlier = self.outputs.setdefault(output.request_id, [])
            assert not earlier or (earlier[-1].finish is None and earlier[-1].error is None), "an output after the last"
            earlier.append(output)
            if output.finish:
                generated = [made.tokens[0].id for made in earlier]
                self.texts.append(self.requests[output.request_id].prompt_token_ids + generated)

    def live(self):
        return [
            request_id for request_id in self.requests if request_id not in self.aborted and not self.ended(request_id)
        ]

    def ended(self, request_id):
        outputs = self.outputs.get(request_id)
        return bool(outputs) and (outputs[-1].finish is not None or outputs[-1].error is not None)

    def run(self):
        for _ in range(self.random.randint(5, 30)):
            if self.random.random() < 0.3:
                self.change_adapters()
            for _ in range(self.random.choice([0, 1, 1, 3])):
                request_id = len(self.requests)
                self.requests[request_id] = self.make_request()
                self.engine.add(request_id, self.requests[request_id])
            if self.random.random() < 0.15 and self.live():
                request_id = self.random.choice(self.live())
                self.aborted.add(request_id)
                self.engine.abort(request_id)
            if self.random.random() < 0.05:
                self.engine.end_session(self.random.choice([("", "a"), ("tenant", "b")]))
            for _ in range(self.random.choice([0, 1, 2, 8])):
                if self.engine.has_work():
                    self.step()
        for _ in range(20_000):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def check(self):
        """Compare every answer; returns how many there were."""
        compared = 0
        for request_id, request in self.requests.items():
            if request_id in self.aborted:
                continue
            outputs = self.outputs[request_id]
            expected = alone(request)
            error = outputs[-1].error
            if error is None:
                assert facts(outputs) == expected
                compared += 1
            elif "KV cache" in error:
                positions = len(request.prompt_token_ids) + len(expected["tokens"]) - 1
                assert -(-positions // self.block_size) > self.block_count - 1, "given up though it fits"
            elif "its adapter could not be loaded again" in error:
                assert request.adapter in self.lost
            else:
                assert error == "the device process died while computing this request"
        return compared

    def check_nothing_is_left(self):
        load = self.engine.load()
        assert (load.waiting, load.running, load.blocks_used) == (0, 0, 0)
        assert load.blocks_total == self.block_count - 1
        blocks = self.engine._scheduler.blocks
        assert blocks.free == blocks.total
        assert not any(blocks._allocator._references)
        for key in list(blocks._leases._leases):
            self.engine.end_session(key)
        assert (blocks._allocator.leased, blocks._allocator.spare) == (0, blocks.total)
        last = len(self.requests)
        self.requests[last] = Request(
            prompt_token_ids=[2], sampling=SamplingParams(), stop=StopParams(max_new_tokens=1)
        )
        self.engine.add(last, self.requests[last])
        while self.engine.has_work():
            self.step()
        assert list(self.runner.rows) == [last], "the device still remembers sequences that are gone"


@pytest.mark.parametrize("deaths", [False, True], ids=["calm", "deadly"])
@pytest.mark.parametrize("case", range(8))
def test_every_answer_is_that_of_the_request_alone(case, deaths):
    compared = preempted = cached = leased = loaded = unloaded = 0
    for number in range(SCENARIOS_PER_CASE):
        scenario = Scenario(f"{case}.{number}.{deaths}", deaths=deaths)
        scenario.run()
        compared += scenario.check()
        scenario.check_nothing_is_left()
        preempted += scenario.preempted
        cached += scenario.cached
        leased += scenario.leased
        loaded += scenario.loaded
        unloaded += scenario.unloaded
    assert compared > 5 * SCENARIOS_PER_CASE
    assert preempted > 0
    assert cached > 0
    assert leased > 0
    assert loaded > SCENARIOS_PER_CASE
    assert unloaded > 0
