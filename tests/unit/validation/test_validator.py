"""What the validator makes of parameters that are within the rules; its messages are tested over the routes."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from serving.errors import ValidationError
from serving.plan import ModelFacts
from serving.tokenizer import Tokenizer
from serving.validation.chat_template import ChatTemplate, Conversation
from serving.validation.parameters import Limits, Parameters
from serving.validation.validator import Piece, Validator

BOS = 256


def make_validator(max_decoder_tokens=0, **changes):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Validator(
        tokenizer=Tokenizer(backend, {"bos_token": "<s>"}),
        chat_template=ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"}),
        limits=Limits(
            max_best_of=4, max_stop_sequences=4, max_top_n_tokens=5, max_input_tokens=99, max_total_tokens=100
        ),
        facts=ModelFacts(
            vocab_size=257,
            max_position=128,
            block_size=4,
            block_count=99,
            max_step_tokens=64,
            max_rows=8,
            dtype="float32",
            device="cpu",
            weight_bytes=0,
            kv_bytes=0,
            max_decoder_tokens=max_decoder_tokens,
        ),
        prefill_logprobs=True,
        **changes,
    )


@pytest.fixture(scope="module")
def validator():
    return make_validator()


def sampling(validator, **parameters):
    return validator.validate("x", Parameters(**parameters)).requests[0].sampling


def test_everything_is_off_by_default(validator):
    given = sampling(validator)
    assert not given.do_sample
    assert (given.temperature, given.top_k, given.top_p, given.typical_p, given.min_p) == (1, 0, 1, 1, 0)
    assert (given.repetition_penalty, given.relative_frequency_penalty, given.top_n_tokens) == (1, 0, 0)


def test_extreme_factors_stay_finite_on_the_device(validator):
    assert sampling(validator, temperature=1e-40).temperature == 1e-5
    assert sampling(validator, temperature=3e38).temperature == 1e5
    assert sampling(validator, repetition_penalty=1e-40).repetition_penalty == 1e-5


def test_the_length_left_is_the_default(validator):
    assert validator.validate("abc", Parameters()).requests[0].stop.max_new_tokens == 96
    assert validator.validate("abc", Parameters(max_new_tokens=96)).requests[0].stop.max_new_tokens == 96


def test_plain_prompts_get_special_tokens_and_chats_do_not(validator):
    plain = validator.validate("a", Parameters())
    chat = validator.validate_chat(Conversation(messages=[{"role": "user", "content": "a"}]), Parameters())
    assert plain.requests[0].prompt_token_ids == chat.requests[0].prompt_token_ids
    assert (plain.characters, chat.characters) == (1, 4)


def test_tools_and_variables_reach_the_template(validator):
    source = "{{ tools[0].n }}{{ kind }}{{ messages[0].content }}"
    template = ChatTemplate(source, {})
    asked = Conversation(
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        tools=[{"n": "f"}],
        template_kwargs={"kind": "k"},
    )
    with_template = Validator(
        tokenizer=validator._tokenizer,
        chat_template=template,
        limits=validator.limits,
        facts=validator.facts,
        prefill_logprobs=False,
    )
    assert with_template.tokenize_chat(asked)[0] == "fkab"


def test_pictures_are_refused(validator):
    picture = {"type": "image_url", "image_url": {"url": "http://a.example/b.png"}}
    content = [{"type": "text", "text": "a"}, picture]
    with pytest.raises(ValidationError, match="image modality is not supported"):
        validator.validate_chat(Conversation(messages=[{"role": "user", "content": content}]), Parameters())


def test_truncation_is_from_the_left(validator):
    validated = validator.validate("abcdef", Parameters(truncate=3))
    assert validated.input_length == 3
    assert (
        validated.requests[0].prompt_token_ids
        == validator.validate("def", Parameters()).requests[0].prompt_token_ids[1:]
    )


def test_an_encoder_reads_the_input_and_the_answer_begins_with_its_own_token():
    validated = make_validator(decoder_start_token_id=7).validate("abc", Parameters(truncate=3, max_new_tokens=97))
    (request,) = validated.requests
    assert request.prompt_token_ids == [7]
    assert request.encoder_token_ids == [64, 65, 66]
    assert (validated.input_length, validated.text) == (3, "abc")
    with pytest.raises(ValidationError, match="`inputs` tokens"):
        make_validator(decoder_start_token_id=7).validate("abc", Parameters(max_new_tokens=97))


def test_an_answer_ends_where_a_decoders_positions_end():
    validator = make_validator(decoder_start_token_id=7, max_decoder_tokens=20)
    assert validator.validate("abc", Parameters()).requests[0].stop.max_new_tokens == 19
    assert validator.validate("a" * 90, Parameters()).requests[0].stop.max_new_tokens == 9
    with pytest.raises(ValidationError, match="`max_new_tokens` must be <= 19"):
        validator.validate("abc", Parameters(max_new_tokens=20))


def test_an_encoder_gives_its_input_no_log_probabilities():
    with pytest.raises(ValidationError, match="encoder-decoder"):
        make_validator(decoder_start_token_id=7).validate("abc", Parameters(prompt_logprobs=True))


def test_samples_share_a_prompt_and_have_their_own_seeds(validator):
    once = validator.validate("a", Parameters(n=4, do_sample=True, seed=9))
    again = validator.validate("a", Parameters(n=4, do_sample=True, seed=9))
    assert once.seeds == again.seeds == [request.sampling.seed for request in once.requests]
    assert once.seeds[0] == 9
    assert len(set(once.seeds)) == 4
    assert all(0 <= seed < 2**64 for seed in once.seeds)
    assert all(request.prompt_token_ids is once.requests[0].prompt_token_ids for request in once.requests)


def test_another_seed_gives_other_samples(validator):
    one, other = (validator.validate("a", Parameters(n=2, do_sample=True, seed=seed)).seeds for seed in (1, 2))
    assert one[1] != other[1]


def test_greedy_answers_tell_no_seed(validator):
    assert validator.validate("a", Parameters(seed=9)).seeds == [None]
    assert validator.validate("a", Parameters(best_of=2, temperature=1.0)).seeds == [None, None]


def test_the_number_of_samples_is_known_before_anything_else(validator):
    assert validator.samples(Parameters(), stream=True) == 1
    assert validator.samples(Parameters(best_of=0), stream=False) == 1
    assert validator.samples(Parameters(n=3), stream=True) == 3
    with pytest.raises(ValidationError, match="`best_of` must be > 0 and <= 4"):
        validator.samples(Parameters(best_of=2**64 - 1), stream=False)


@pytest.mark.parametrize("name", ["", "-1", "1.0", "٣", "257", "9" * 5000, " 1"])
def test_biases_name_tokens_of_the_model(validator, name):
    with pytest.raises(ValidationError, match="`logit_bias` keys must be token ids < 257"):
        validator.validate("a", Parameters(logit_bias={name: 1.0}))


def test_pieces_are_slices_of_the_text_in_bytes(validator):
    assert validator.tokenize("é") == [Piece(BOS, "", 0, 0), Piece(127, "é", 0, 2), Piece(102, "é", 0, 2)]
