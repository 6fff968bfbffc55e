from fakes import byte_tokenizer

from serving.engine.sequence import Sequence
from serving.protocol import Request, SamplingParams, StopParams


def sequence(*, prompt=(5, 6, 7), **stop):
    sampling = SamplingParams(prompt_logprobs=True)
    request = Request(prompt_token_ids=list(prompt), sampling=sampling, stop=StopParams(max_new_tokens=5, **stop))
    return Sequence.start(3, request, tokenizer=byte_tokenizer(), eos_token_ids=frozenset({0}), arrived=1.5)


def test_known_and_computed_are_counted_apart():
    made = sequence()
    made.token_ids += [8, 9]
    made.computed = 4
    assert (made.prompt_length, made.generated, made.pending) == (3, 2, 1)


def test_the_requests_own_prompt_is_not_changed():
    made = sequence()
    made.token_ids.append(8)
    assert made.request.prompt_token_ids == [5, 6, 7]


def test_end_ids_are_the_models_and_the_requests():
    assert sequence(stop_token_ids=(4,)).end_ids == {0, 4}
    assert sequence(stop_token_ids=(4,), ignore_eos=True).end_ids == {4}


def test_prompt_logits_are_wanted_until_all_are_there():
    made = sequence()
    assert made.wants_prompt_logits
    made.prompt_logprobs = [-1.0, -2.0]
    assert not made.wants_prompt_logits


def test_a_new_device_knows_nothing_and_the_tokens_stay():
    made = sequence()
    made.token_ids.append(8)
    made.computed, made.blocks, made.digests, made.remembered = 3, [1, 2], [b"digest"], 1
    made.running, made.on_device, made.refused, made.deaths = True, True, (1, 1), 2
    made.forget_device()
    assert (made.computed, made.blocks, made.digests, made.remembered) == (0, [], [], 0)
    assert (made.running, made.on_device, made.refused) == (False, False, None)
    assert made.token_ids == [5, 6, 7, 8]
    assert made.suspect
