"""The roof: limits that follow from what was said and what was measured."""

import json

import pytest
from fakes import byte_tokenizer

from serving.errors import ConfigurationError
from serving.plan import ModelFacts
from serving.settings import Settings
from serving.tokenizer import Tokenizer
from serving.weights.model_config import ModelConfig
from serving.wsgi import build, derive_limits, end_of_sequence_ids


def facts(**changes) -> ModelFacts:
    usual = {
        "vocab_size": 100,
        "max_position": 4096,
        "block_size": 16,
        "block_count": 1025,
        "max_step_tokens": 512,
        "max_rows": 8,
        "dtype": "float32",
        "device": "cpu",
        "weight_bytes": 0,
        "kv_bytes": 0,
    }
    return ModelFacts(**{**usual, **changes})


@pytest.mark.parametrize(
    ("measured", "model_max_length", "longest"),
    [
        (facts(), None, 4096),
        (facts(), 2048, 2048),
        (facts(max_position=1024), 2048, 1024),
        (facts(block_count=11), None, 160),  # block 0 is never handed out
        (facts(max_step_tokens=64), None, 4096),  # a prompt may take several steps
    ],
)
def test_unsaid_limits_are_what_cache_tokenizer_and_model_allow(measured, model_max_length, longest):
    limits = derive_limits(Settings(), measured, model_max_length)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (longest, longest - 1)


@pytest.mark.parametrize(
    ("said", "total", "longest_input"),
    [({}, 1024, 512), ({"max_total_tokens": 900}, 900, 512), ({"max_total_tokens": 400}, 400, 399)],
)
def test_an_encoder_reads_what_it_was_measured_with_and_the_tokenizers_limit_is_not_for_both_texts(
    said, total, longest_input
):
    measured = facts(max_position=1024, max_encoder_tokens=512)
    limits = derive_limits(Settings(**said), measured, 512)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (total, longest_input)


@pytest.mark.parametrize(
    ("said", "blocks", "total", "longest_input"),
    [
        ({}, 33, 1024, 512),  # as many as one answer needs: what is read is kept elsewhere
        ({"max_total_tokens": 900}, 33, 900, 512),
        ({}, 11, 160, 159),
    ],
)
def test_a_decoder_whose_positions_end_leaves_the_rest_to_its_encoder(said, blocks, total, longest_input):
    measured = facts(max_position=1024, max_encoder_tokens=512, max_decoder_tokens=512, block_count=blocks)
    limits = derive_limits(Settings(**said), measured, None)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (total, longest_input)


def test_what_was_said_holds():
    limits = derive_limits(Settings(max_total_tokens=100, max_input_tokens=50, max_best_of=3), facts(), None)
    assert (limits.max_total_tokens, limits.max_input_tokens, limits.max_best_of) == (100, 50, 3)


@pytest.mark.parametrize(
    ("settings", "measured", "words"),
    [
        (Settings(max_total_tokens=200), facts(block_count=11), "Not enough memory to handle `max_total_tokens=200`"),
        (Settings(max_total_tokens=200), facts(max_position=128), "128 positions of the model"),
        (
            Settings(max_input_tokens=600),
            facts(max_position=1024, max_encoder_tokens=512, max_decoder_tokens=512),
            "512 positions of the model's encoder",
        ),
        (Settings(max_input_tokens=4096), facts(), "`max_input_tokens` must be < `max_total_tokens`"),
    ],
)
def test_what_cannot_hold_is_refused(settings, measured, words):
    with pytest.raises(ConfigurationError) as error:
        derive_limits(settings, measured, None)
    assert words in str(error.value)


def test_a_tokenizers_absurd_length_is_no_limit(tmp_path):
    for length, longest in ((int(1e30), 4096), (1e30, 4096), (100, 100), (-1, 4096), ("many", 4096), (None, 4096)):
        tokenizer = written_tokenizer(tmp_path, {"model_max_length": length})
        assert derive_limits(Settings(), facts(), tokenizer.model_max_length).max_total_tokens == longest


def written_tokenizer(directory, config):
    (directory / "tokenizer.json").write_text(byte_tokenizer().to_json())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "generation", "eos_token", "ids"),
    [
        ({}, {}, None, set()),
        ({"eos_token_id": 9}, {}, None, {9}),
        ({"eos_token_id": [8, 9]}, {}, None, {8, 9}),
        ({}, {"eos_token_id": 7}, None, {7}),
        ({}, {"eos_token_id": [6, 7]}, None, {6, 7}),
        ({}, {}, "</s>", {0}),
        ({}, {}, {"content": "<s>"}, {1}),
        ({"eos_token_id": [8, 9]}, {"eos_token_id": [7, 8]}, "<s>", {1, 7, 8, 9}),
        ({"vocab_size": 1}, {}, "<s>", set()),
    ],
)
def test_every_id_that_some_file_calls_the_end_ends_a_text(tmp_path, config, generation, eos_token, ids):
    sizes = {"vocab_size": 258, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **config}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = written_tokenizer(tmp_path, {"eos_token": eos_token})
    assert end_of_sequence_ids(ModelConfig.load(tmp_path), tokenizer) == ids


def test_without_a_model_nothing_is_built():
    with pytest.raises(ConfigurationError, match="MODEL_ID"):
        build(Settings())
