"""What the engine makes of rows that the device could not choose for, and of ends under a grammar."""

import pytest
from fakes import FakeRunner, byte_tokenizer

from serving.engine.engine import Engine
from serving.plan import RowResult
from serving.protocol import FinishReason, Grammar, GrammarKind, Request, SamplingParams, StopParams

TOKENIZER = byte_tokenizer()
EOS = 0
GRAMMAR = Grammar(GrammarKind.REGEX, "a*")


class Unwilling(FakeRunner):
    """Says of a row, as often as it is told to, that it cannot choose."""

    def __init__(self, answers, **options):
        super().__init__(**options)
        self.answers = answers
        self.asked = []

    def _answer(self, row):
        self.asked.append((row.sequence_id, row.position, len(row.token_ids)))
        answers = self.answers.get(row.sequence_id) if row.sample else None
        fault = answers.pop(0) if answers else None
        return super()._answer(row) if fault is None else RowResult(sequence_id=row.sequence_id, **fault)


def request(prompt, *, n=6, grammar=None, **stop):
    return Request(
        prompt_token_ids=TOKENIZER.encode(prompt),
        sampling=SamplingParams(grammar=grammar),
        stop=StopParams(max_new_tokens=n, **stop),
    )


def run(runner, requests, **options):
    engine = Engine(runner, TOKENIZER, eos_token_ids=frozenset({EOS}), max_step_tokens=512, max_rows=64, **options)
    for number, asked in enumerate(requests):
        engine.add(number, asked)
    found = {number: [] for number in range(len(requests))}
    while engine.has_work():
        for output in engine.step()[0]:
            found[output.request_id].append(output)
    assert engine.load().blocks_used == 0
    return found


def ids(outputs):
    return [token.id for output in outputs for token in output.tokens]


def test_a_row_that_the_device_gave_up_fails_alone():
    requests = [request("one"), request("two"), request("three")]
    expected = run(FakeRunner(), requests)

    found = run(Unwilling({1: [None, None, {"error": "the grammar cannot be followed"}]}), requests)

    assert ids(found[0]) == ids(expected[0])
    assert ids(found[2]) == ids(expected[2])
    assert ids(found[1]) == ids(expected[1])[:2]
    assert found[1][-1].error == "the grammar cannot be followed"
    assert found[1][-1].finish is None


@pytest.mark.parametrize("prompt", ["abc", "abcd", "abcde"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_row_that_waits_is_computed_again_and_loses_nothing(prompt, prefix_caching):
    requests = [request(prompt), request("other"), request(prompt + "x")]
    expected = run(FakeRunner(), requests, prefix_caching=prefix_caching)
    runner = Unwilling({0: [{"waiting": True}] * 3, 2: [None, {"waiting": True}]})

    found = run(runner, requests, prefix_caching=prefix_caching)

    assert {number: ids(outputs) for number, outputs in found.items()} == {
        number: ids(outputs) for number, outputs in expected.items()
    }
    last = len(prompt) - 1
    assert [asked[1:] for asked in runner.asked if asked[0] == 0][:5] == [
        (0, len(prompt)),
        (last, 1),
        (last, 1),
        (last, 1),
        (last + 1, 1),
    ]


def test_prompt_logprobs_of_a_row_that_waits_are_kept():
    asked = Request(
        prompt_token_ids=TOKENIZER.encode("abcdef"),
        sampling=SamplingParams(prompt_logprobs=True),
        stop=StopParams(max_new_tokens=2),
    )

    class WaitingOnce(FakeRunner):
        waited = False

        def _answer(self, row):
            result = super()._answer(row)
            if row.sample and not self.waited:
                self.waited = True
                self.rows[row.sequence_id].token_ids.pop()
                return RowResult(sequence_id=row.sequence_id, prompt_logprobs=result.prompt_logprobs, waiting=True)
            return result

    found = run(WaitingOnce(), [asked])[0]

    assert [known.logprob for known in found[0].prompt] == [
        known.logprob for known in run(FakeRunner(), [asked])[0][0].prompt
    ]


@pytest.mark.parametrize(("grammar", "reason"), [(GRAMMAR, FinishReason.EOS_TOKEN), (None, FinishReason.LENGTH)])
def test_an_end_token_ends_what_has_a_grammar_even_if_it_was_to_be_ignored(grammar, reason):
    runner = FakeRunner(reply=lambda prompt: TOKENIZER.encode("aa"), eos_token_id=EOS)

    found = run(runner, [request("x", n=5, grammar=grammar, ignore_eos=True)])[0]

    assert found[-1].finish.reason is reason


def test_the_grammar_reaches_the_device():
    runner = FakeRunner()
    engine = Engine(runner, TOKENIZER, eos_token_ids=frozenset({EOS}), max_step_tokens=512, max_rows=64)
    engine.add(1, request("x", grammar=GRAMMAR))
    engine.step()

    assert runner.rows[1].sampling.grammar == GRAMMAR
