"""A model that computes otherwise on the paged cache than by itself is not served."""

import pytest
import torch

from serving.errors import ModelError
from serving.layers.attention.kv_cache import KVShape
from serving.layers.builder import Built
from serving.runner.self_check import HasOracle, check

CPU = torch.device("cpu")


class Echo:
    """Its logits tell a token's id and position; `on_cache` spoils what it computes from a batch."""

    def __init__(self, on_cache=lambda x, batch: x):
        self.on_cache = on_cache

    def __call__(self, batch):
        return self.on_cache(self.embedded(batch.input_ids, batch.positions), batch)

    def logits(self, hidden):
        return hidden

    def oracle(self, token_ids, text):
        return self.embedded(token_ids, torch.arange(len(token_ids)))

    def embedded(self, ids, positions):
        return torch.nn.functional.one_hot(ids, 50).float() + positions[:, None] / 100


def checked(model, **changes):
    built = Built(kv_shapes=[KVShape(1, 4)])
    said = {"vocab_size": 50, "longest": 256, "dtype": torch.float32, "device": CPU, **changes}
    check(model, built, **said)


def test_what_computes_the_same_passes():
    assert isinstance(Echo(), HasOracle)
    checked(Echo())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, batch: x * 1.05,
        lambda x, batch: x * float("nan"),
        lambda x, batch: x + batch.positions.max() / 1000,  # of whoever stands farthest in the batch
        lambda x, batch: torch.where((batch.positions > 10)[:, None], x.roll(1, 0), x),  # the first chunk is right
    ],
    ids=["scaled", "not a number", "looks at its batch mates", "goes wrong after a chunk"],
)
def test_what_does_not_is_refused(spoil):
    with pytest.raises(ModelError, match="apart from those that it computes by itself"):
        checked(Echo(spoil))


def test_rounding_of_a_narrow_type_is_forgiven():
    checked(Echo(lambda x, batch: x * 1.05), dtype=torch.bfloat16)


def test_code_that_fails_is_said_in_one_line():
    def fail(x, batch):
        raise TypeError("no such argument\nand more")

    with pytest.raises(ModelError, match=r"fails on a paged cache: no such argument$"):
        checked(Echo(fail))


def test_a_head_of_another_width_than_the_vocabulary_is_refused():
    with pytest.raises(ModelError, match=r"50 logits, but config\.json says vocab_size 49"):
        checked(Echo(), vocab_size=49)
