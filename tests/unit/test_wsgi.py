"""The roof: limits that follow from what was said and what was measured."""

import pytest

from serving.errors import ConfigurationError
from serving.plan import ModelFacts
from serving.settings import Settings
from serving.wsgi import build, derive_limits


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
    ],
)
def test_unsaid_limits_are_what_cache_tokenizer_and_model_allow(measured, model_max_length, longest):
    limits = derive_limits(Settings(), measured, model_max_length)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (longest, longest - 1)


def test_what_was_said_holds():
    limits = derive_limits(Settings(max_total_tokens=100, max_input_tokens=50, max_best_of=3), facts(), None)
    assert (limits.max_total_tokens, limits.max_input_tokens, limits.max_best_of) == (100, 50, 3)


@pytest.mark.parametrize(
    ("settings", "measured", "words"),
    [
        (Settings(max_total_tokens=200), facts(block_count=11), "Not enough memory to handle `max_total_tokens=200`"),
        (Settings(max_total_tokens=200), facts(max_position=128), "128 positions of the model"),
        (Settings(max_input_tokens=4096), facts(), "`max_input_tokens` must be < `max_total_tokens`"),
    ],
)
def test_what_cannot_hold_is_refused(settings, measured, words):
    with pytest.raises(ConfigurationError) as error:
        derive_limits(settings, measured, None)
    assert words in str(error.value)


def test_without_a_model_nothing_is_built():
    with pytest.raises(ConfigurationError, match="MODEL_ID"):
        build(Settings())
