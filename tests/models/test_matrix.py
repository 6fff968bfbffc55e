"""Every case x {prefill, chunks, decode, prefix, mixed batches}, in float32 against transformers (ranks: `test_ranks`).

`make test` plays each cell once, `make test-models` ten times over, each time with other lengths and other blocks.
"""

import os
import random

import pytest
import torch
from models.hand_fed import BLOCK, row, worst_difference

pytestmark = pytest.mark.models
ROUNDS = max(1, round(float(os.environ.get("WEIR_TEST_SCALE", "1"))))
TOLERANCE = 1e-5
LENGTHS = (1, 2, 5, 16, 17, 33, 40)  # of prompts: on both sides of blocks and windows


class Round:
    """A game with random sequences in random blocks, and what transformers says of them.

    Args:
        lengths: of the prompts; every sequence has six tokens more.
    """

    def __init__(self, pair, rng, lengths):
        theirs, self.ours = pair
        self.rng, self.lengths = rng, lengths
        self.sequences = [[rng.randrange(131) for _ in range(n + 6)] for n in lengths]
        free = iter(rng.sample(range(1, 128), 120))
        self.tables = [[next(free) for _ in range(-(-len(ids) // BLOCK))] for ids in self.sequences]
        self.computed = [0] * len(lengths)
        with torch.inference_mode():
            self.wanted = [theirs(torch.tensor([ids])).logits[0] for ids in self.sequences]

    def compute(self, counts):
        """One step, `counts` tokens of each sequence, held to transformers."""
        chosen = [i for i, count in enumerate(counts) if count]
        ends = [done + count for done, count in zip(self.computed, counts, strict=True)]
        rows = [row(i, self.sequences[i], self.computed[i], ends[i], self.tables[i]) for i in chosen]
        for i, got in zip(chosen, self.ours.logits(rows), strict=True):
            assert worst_difference(got, self.wanted[i][self.computed[i] : ends[i]]) < TOLERANCE
            self.computed[i] = ends[i]

    def left(self):
        return [len(ids) - done for ids, done in zip(self.sequences, self.computed, strict=True)]


@pytest.fixture(params=range(ROUNDS))
def rng(request):
    return random.Random(request.param)


def test_prefill(pair, rng):
    """Whole prompts, one after the other."""
    game = Round(pair, rng, rng.sample(LENGTHS, 3))
    for i, length in enumerate(game.lengths):
        game.compute([length if j == i else 0 for j in range(len(game.lengths))])


def test_chunks(pair, rng):
    """A long prompt in chunks of random sizes."""
    game = Round(pair, rng, [40])
    while left := game.left()[0]:
        game.compute([min(rng.choice([1, 2, 3, 4, 8, 19]), left)])


def test_decode(pair, rng):
    """Prompts of different lengths together, then a token of each at a time."""
    game = Round(pair, rng, rng.sample(LENGTHS, 4))
    game.compute(game.lengths)
    while any(game.left()):
        game.compute([1] * len(game.lengths))


def test_prefix(pair, rng):
    """A sequence that takes over blocks which another has filled."""
    game = Round(pair, rng, [rng.choice([2, 3, 4, 5]) * BLOCK, 30])
    shared = game.lengths[0] // BLOCK
    game.compute([game.lengths[0], 0])
    theirs, _ = pair
    game.sequences[1][: shared * BLOCK] = game.sequences[0][: shared * BLOCK]
    game.tables[1][:shared] = game.tables[0][:shared]
    game.computed[1] = shared * BLOCK
    with torch.inference_mode():
        game.wanted[1] = theirs(torch.tensor([game.sequences[1]])).logits[0]
    while any(left := game.left()):
        game.compute([min(rng.choice([1, 5]), count) for count in left])


def test_mixed_batches(pair, rng):
    """Random chunks first, single tokens at the end; some rows sit a step out."""
    game = Round(pair, rng, LENGTHS)
    while any(left := game.left()):
        wished = [rng.choice([1, 1, 3, 8, 19]) if count > 6 else 1 for count in left]
        counts = [min(pair) if rng.random() < 0.8 else 0 for pair in zip(wished, left, strict=True)]
        if any(counts):
            game.compute(counts)
