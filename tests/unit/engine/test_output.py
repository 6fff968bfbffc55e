import pytest
import tokenizers
from tokenizers import decoders, models

from serving.engine.output import OutputProcessor
from serving.engine.sequence import Sequence
from serving.errors import GenerationError
from serving.plan import Choice, Row, RowResult
from serving.protocol import FinishReason, Request, SamplingParams, StopParams
from serving.tokenizer import Tokenizer

# In the signs that byte-level tokenizers write bytes with; token 3 is a space and the first byte of an emoji.
VOCABULARY = ["</s>", "a", "b", "Ġð", "Ł", "ĺ", "Ģ"]


def make_tokenizer():
    backend = tokenizers.Tokenizer(models.BPE(vocab={text: at for at, text in enumerate(VOCABULARY)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"eos_token": "</s>"})


class Generation:
    """One sequence whose tokens are given one by one."""

    def __init__(self, *, n=100, sampling=None, **stop):
        tokenizer = make_tokenizer()
        request = Request(
            prompt_token_ids=[1, 2, 1],
            sampling=sampling or SamplingParams(),
            stop=StopParams(max_new_tokens=n, **stop),
        )
        self.sequence = Sequence.start(7, request, tokenizer=tokenizer, eos_token_ids=frozenset({0}), arrived=10.0)
        self.sequence.begun = 11.0
        self.processor = OutputProcessor(tokenizer, vocab_size=len(VOCABULARY) + 5)

    def take(self, result, *, position, sample, now=20.0):
        row = Row(sequence_id=7, token_ids=[1], position=position, block_table=[1], sample=sample)
        return self.processor.process(self.sequence, row, result, now)

    def token(self, token_id, **options):
        result = RowResult(sequence_id=7, choice=Choice(token_id, -0.5))
        return self.take(result, position=len(self.sequence.token_ids) - 1, sample=True, **options)


def test_an_output_says_what_the_token_is():
    output = Generation().token(1)
    assert output.request_id == 7
    assert (output.text, output.finish, output.error) == ("a", None, None)
    (token,) = output.tokens
    assert (token.id, token.text, token.logprob, token.special, token.top) == (1, "a", -0.5, False, [])


@pytest.mark.parametrize(("shown", "text"), [((), "ab"), ((0,), "a</s>b")])
@pytest.mark.parametrize("stop_strings", [(), ("nothing",)])
def test_a_special_token_belongs_to_the_text_only_where_it_shall(shown, text, stop_strings):
    generation = Generation(n=3, ignore_eos=True, shown_token_ids=shown, stop_strings=stop_strings)
    outputs = [generation.token(token_id) for token_id in (1, 0, 2)]
    assert "".join(output.text for output in outputs) == outputs[-1].finish.text == text


def test_text_before_an_incomplete_character_is_not_lost_at_the_end():
    generation = Generation(n=2)
    first, second = generation.token(1), generation.token(3)
    assert (first.text, second.text, second.tokens[0].text) == ("a", " ", "")
    assert second.finish.text == "a "


def test_text_before_an_incomplete_character_is_not_lost_before_an_end_token():
    generation = Generation()
    assert [generation.token(token_id).text for token_id in (1, 3, 0)] == ["a", "", " "]


def test_a_stop_string_is_cut_even_when_the_length_ends_it():
    generation = Generation(n=2, stop_strings=("b",), keep_stop_text=False)
    generation.token(1)
    finish = generation.token(2).finish
    assert (finish.reason, finish.text) == (FinishReason.LENGTH, "a")


def test_ids_that_are_no_token_add_no_text():
    generation = Generation()
    assert [generation.token(token_id).text for token_id in (1, 9, 2)] == ["a", "", "b"]


def test_the_times_count_from_arrival_and_from_the_first_step():
    finish = Generation().token(0, now=14.5).finish
    assert (finish.queue_s, finish.inference_s) == (1.0, 3.5)


def test_chunks_of_the_prompt_give_no_output_but_their_log_probabilities():
    generation = Generation(sampling=SamplingParams(prompt_logprobs=True))
    assert generation.take(RowResult(sequence_id=7, prompt_logprobs=[-1.0]), position=0, sample=False) is None
    last = RowResult(sequence_id=7, prompt_logprobs=[-2.0], choice=Choice(1, -0.5))
    prompt = generation.take(last, position=1, sample=True).prompt
    assert [(token.id, token.text, token.logprob) for token in prompt] == [
        (1, "a", None),
        (2, "b", -1.0),
        (1, "a", -2.0),
    ]


def test_a_prompt_computed_twice_is_reported_once():
    generation = Generation(sampling=SamplingParams(prompt_logprobs=True))
    generation.take(RowResult(sequence_id=7, prompt_logprobs=[-1.0]), position=0, sample=False)
    again = RowResult(sequence_id=7, prompt_logprobs=[-1.0, -2.0], choice=Choice(1, -0.5))
    assert [token.logprob for token in generation.take(again, position=0, sample=True).prompt] == [None, -1.0, -2.0]


@pytest.mark.parametrize(
    ("choice", "sample"), [(None, True), (Choice(1, -0.5), False), (Choice(12, -0.5), True), (Choice(-1, 0.0), True)]
)
def test_nonsense_leaves_the_sequence_as_it_was(choice, sample):
    generation = Generation()
    with pytest.raises(GenerationError):
        generation.take(RowResult(sequence_id=7, choice=choice), position=2, sample=sample)
    assert generation.sequence.token_ids == [1, 2, 1]
