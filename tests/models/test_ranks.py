"""Every architecture shared out over ranks equals transformers; what cannot be shared out is refused."""

import pytest
import torch
from models.cases import CASES, randomized
from models.hand_fed import Ours, row, worst_difference
from models.rank_threads import on_ranks
from transformers import LlamaConfig

from serving.errors import ModelError

IDS = [(7 * i + 3) % 131 for i in range(24)]
TABLE = list(range(1, 8))


def chunk_then_tokens(directory, ranks):
    """Logits of a prompt of 20 in two chunks, then of four single tokens."""
    ours = Ours(directory, ranks=ranks)
    spans = [(0, 13), (13, 20), (20, 21), (21, 22), (22, 23), (23, 24)]
    return torch.cat([ours.logits([row(0, IDS, start, end, TABLE)])[0] for start, end in spans])


@pytest.mark.models
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_transformers(case, size, tmp_path):
    theirs = randomized(CASES[case])
    theirs.save_pretrained(tmp_path)
    got = on_ranks(size, lambda ranks: chunk_then_tokens(tmp_path, ranks))
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS])).logits[0]
    assert worst_difference(got, want) < 1e-5


def test_ranks_share_the_weights_out(tmp_path):
    randomized(CASES["llama"]).save_pretrained(tmp_path)
    whole = Ours(tmp_path).built.weight_bytes
    part = on_ranks(2, lambda ranks: Ours(tmp_path, ranks=ranks).built.weight_bytes)
    assert whole / 2 < part < whole * 0.52  # norms are everybody's, and the odd vocabulary has a row more


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate", "size", "message"),
    [
        (6, 2, 80, 4, "--num-shard 4: 4 ranks cannot share the 6 heads of .*q_proj"),
        (6, 3, 80, 2, "--num-shard 2: 2 ranks cannot share the 3 heads of .*q_proj"),
        (8, 2, 81, 2, "--num-shard 2: 2 ranks cannot share the 81 outputs of .*gate_proj"),
    ],
)
def test_what_does_not_divide_is_refused_clearly(heads, kv_heads, intermediate, size, message, tmp_path):
    config = LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
    )  # fmt: skip
    randomized(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        on_ranks(size, lambda ranks: Ours(tmp_path, ranks=ranks))
