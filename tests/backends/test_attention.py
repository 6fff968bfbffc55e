"""Every attention backend against its slow twin, `sdpa`, or `eager` for what `sdpa` cannot do, in float32."""

import random

import pytest
import torch

from serving.layers.attention.backend import AttentionSpec
from serving.layers.attention.kv_cache import KVCache, KVShape, block_bytes
from serving.layers.attention.position_bias import LinearBias, RelativeBias, alibi_slopes
from serving.layers.attention.select import BACKENDS, fastest, select
from serving.layers.cpu_kernels import compiled_library
from serving.plan import Row
from serving.runner.inputs import InputBuilder

CPU, BLOCK = torch.device("cpu"), 16
AVAILABLE = [name for name in sorted(BACKENDS) if name != "native" or compiled_library()]


def attended(backend, spec, dtype, rows, query, key, value, past):
    keys_only = spec.value_dim is not None
    cache = KVCache([KVShape(spec.kv_heads, spec.head_dim, keys_only)], 300, BLOCK, dtype, CPU)
    cache.keys[0].copy_(past[0])
    if not keys_only:
        cache.values[0].copy_(past[1])
    attention = select(backend)(spec)
    padded = [spec.reads] if attention.padded_tokens else []
    batch = InputBuilder(cache, BLOCK, [spec.reads], dtype, CPU, padded).build(rows).batch
    value = None if keys_only else value.to(dtype)
    return attention(query.to(dtype), key.to(dtype), value, batch).float()


def held_to_twin(backend, spec, counts, twin="sdpa"):
    """Scores pass through bfloat16 once where the twin keeps them in float32."""
    rng = random.Random(len(counts) * spec.heads)
    torch.manual_seed(0)
    free = iter(rng.sample(range(1, 300), 299))
    rows = []
    for i, count in enumerate(counts):
        position = rng.randrange(70)
        table = [next(free) for _ in range(-(-(position + count) // BLOCK))]
        rows.append(Row(sequence_id=i, token_ids=[0] * count, position=position, block_table=table, sample=True))
    tokens = sum(counts)
    query = torch.randn(tokens, spec.heads, spec.head_dim).bfloat16().float()
    key, value = (torch.randn(tokens, spec.kv_heads, spec.head_dim).bfloat16().float() for _ in range(2))
    past = [torch.randn(300, BLOCK, spec.kv_heads, spec.head_dim).bfloat16().float() for _ in range(2)]
    exact = attended(twin, spec, torch.float32, rows, query, key, value, past)
    slow = attended(twin, spec, torch.bfloat16, rows, query, key, value, past)
    got = attended(backend, spec, torch.bfloat16, rows, query, key, value, past)
    assert (got - exact).abs().mean() <= 3 * (slow - exact).abs().mean()
    assert (got - exact).abs().max() <= 0.05


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("window", "biased"), [(None, False), (20, False), (None, True)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 4, 64), (4, 4, 32), (8, 1, 16)])
@pytest.mark.parametrize("counts", [[1] * 3, [1] * 8, [1] * 33, [5, 96, 200], [1] * 9 + [130]])
def test_every_backend_is_as_near_to_float32_as_its_slow_twin(
    backend, window, biased, heads, kv_heads, head_dim, counts
):
    spec = AttentionSpec(
        layer=0, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, window=window,
        bias=LinearBias(torch.tensor(alibi_slopes(heads))) if biased else None,
    )  # fmt: skip
    held_to_twin(backend, spec, counts)


COUNTS = [[1] * 3, [1] * 9, [5, 96], [1] * 9 + [130]]


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name not in ("eager", "sdpa")])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("softcap", "window"), [(1.5, None), (1.5, 20), (50.0, None)])
def test_capped_scores_are_as_near_as_where_every_score_is_written_out(backend, softcap, window, counts):
    spec = AttentionSpec(
        layer=0, heads=8, kv_heads=2, head_dim=32, scale=32**-0.5, window=window, softcap=softcap
    )  # fmt: skip
    held_to_twin(backend, spec, counts, "eager")


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name not in ("eager", "sdpa")])
@pytest.mark.parametrize("asked", [{"softcap": 50.0}, {"value_dim": 8}])
def test_neither_falls_back_to_a_slower_backend(backend, asked):
    spec = AttentionSpec(layer=0, heads=2, kv_heads=1, head_dim=16, scale=0.25, window=None, **asked)
    assert type(select(backend)(spec)).__module__ == BACKENDS[backend].partition(":")[0]


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name not in ("eager", "sdpa")])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (40, 1), (6, 2)])
def test_values_within_keys_are_as_near_as_where_every_score_is_written_out(backend, heads, kv_heads, counts):
    spec = AttentionSpec(
        layer=0, heads=heads, kv_heads=kv_heads, head_dim=40, scale=40**-0.5, window=None, value_dim=32
    )
    held_to_twin(backend, spec, counts, "eager")


def test_many_scores_stay_with_the_twin_that_holds_a_tile_of_them(monkeypatch):
    monkeypatch.setattr("serving.layers.attention.matmul._MAX_SCORES", 10)
    spec = AttentionSpec(layer=0, heads=2, kv_heads=2, head_dim=16, scale=0.25, window=None)
    rows = [Row(sequence_id=0, token_ids=[0] * 100, position=0, block_table=list(range(1, 8)), sample=True)]
    tensors = [torch.randn(100, 2, 16) for _ in range(3)]
    past = [torch.zeros(300, BLOCK, 2, 16)] * 2
    twin = attended("sdpa", spec, torch.bfloat16, rows, *tensors, past)
    assert torch.equal(attended("matmul", spec, torch.bfloat16, rows, *tensors, past), twin)


def test_float32_keeps_the_kernel_whose_rows_do_not_depend_on_their_batch():
    assert fastest(CPU, torch.float32) == "sdpa"
    assert fastest(CPU, torch.bfloat16) == ("native" if compiled_library() else "matmul")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_soft_cap_is_computed_by_a_backend_that_can_and_never_left_out(backend):
    torch.manual_seed(0)
    spec = AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=16, scale=0.5, window=20, softcap=2.0)
    rows = [Row(sequence_id=0, token_ids=[0] * 40, position=0, block_table=[3, 2, 1], sample=True)]
    query, key, value = torch.randn(40, 4, 16) * 3, torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    got = attended(backend, spec, torch.float32, rows, query, key, value, [torch.zeros(300, BLOCK, 2, 16)] * 2)
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * 0.5
    distance = torch.arange(40)[:, None] - torch.arange(40)
    hidden = (distance < 0) | (distance >= 20)
    chances = (2 * (scores / 2).tanh()).masked_fill(hidden, float("-inf")).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", chances, value.repeat_interleave(2, 1)).flatten(1)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("counts", [[1], [1] * 9, [40, 100]])
def test_blocks_outside_the_window_are_never_read(backend, counts):
    torch.manual_seed(0)
    window, positions = 20, [57 + 31 * i for i in range(len(counts))]
    free = iter(range(1, 300))
    rows = [
        Row(sequence_id=i, token_ids=[0] * count, position=position, sample=True,
            block_table=[next(free) for _ in range(-(-(position + count) // BLOCK))])
        for i, (count, position) in enumerate(zip(counts, positions, strict=True))
    ]  # fmt: skip
    spec = AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=16, scale=0.25, window=window)
    query, key, value = (torch.randn(sum(counts), heads, 16) for heads in (4, 2, 2))
    past = [torch.randn(300, BLOCK, 2, 16) for _ in range(2)]
    want = attended("eager", spec, torch.bfloat16, rows, query, key, value, past)
    for row in rows:
        outside = row.block_table[: (row.position - window + 1) // BLOCK]
        assert outside
        for kept in past:
            kept[outside] = float("nan")
    got = attended(backend, spec, torch.bfloat16, rows, query, key, value, past)
    assert (got - want).abs().max() < 0.05


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_values_may_be_the_first_numbers_of_the_keys_and_are_then_not_kept(backend):
    torch.manual_seed(0)
    spec = AttentionSpec(layer=0, heads=4, kv_heads=1, head_dim=20, scale=0.2, window=None, value_dim=16)
    rows = [Row(sequence_id=0, token_ids=[0] * 40, position=0, block_table=[3, 2, 1], sample=True)]
    query, key = torch.randn(40, 4, 20), torch.randn(40, 1, 20)
    got = attended(backend, spec, torch.float32, rows, query, key, None, [torch.zeros(300, BLOCK, 1, 20)])
    scores = torch.einsum("qhd,kd->hqk", query, key[:, 0]) * 0.2
    chances = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)
    assert torch.allclose(got, torch.einsum("hqk,kd->qhd", chances, key[:, 0, :16]).flatten(1), atol=1e-5)
    shape = KVShape(1, 20, keys_only=True)
    assert KVCache([shape], 3, BLOCK, torch.float32, CPU).nbytes == 3 * block_bytes([shape], BLOCK, torch.float32)
    assert block_bytes([shape], BLOCK, torch.float32) == BLOCK * 20 * 4


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("counts", [[1], [1] * 9, [40], [120]])
def test_linear_biases_are_what_the_paper_says(backend, counts):
    torch.manual_seed(0)
    slopes, past_tokens = torch.tensor(alibi_slopes(6)), 32
    spec = AttentionSpec(layer=0, heads=6, kv_heads=2, head_dim=16, scale=0.5, window=None, bias=LinearBias(slopes))
    tables = [[1 + 10 * i + j for j in range(10)] for i in range(len(counts))]
    rows = [
        Row(sequence_id=i, token_ids=[0] * count, position=past_tokens, block_table=tables[i], sample=True)
        for i, count in enumerate(counts)
    ]
    tokens = sum(counts)
    query, key, value = torch.randn(tokens, 6, 16), torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16)
    past = [torch.randn(300, BLOCK, 2, 16) for _ in range(2)]
    dtype = torch.bfloat16 if backend == "native" else torch.float32
    got, start = attended(backend, spec, dtype, rows, query, key, value, past), 0
    for count, table in zip(counts, tables, strict=True):
        span = slice(start, start + count)
        whole = [
            torch.cat([kept[table].flatten(0, 1)[:past_tokens], new[span]]).repeat_interleave(3, 1)
            for kept, new in zip(past, (key, value), strict=True)
        ]
        distance = torch.arange(past_tokens, past_tokens + count)[:, None] - torch.arange(past_tokens + count)
        scores = torch.einsum("qhd,khd->hqk", query[span], whole[0]) * 0.5 - slopes[:, None, None] * distance
        chances = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        want = torch.einsum("hqk,khd->qhd", chances, whole[1]).flatten(1)
        assert torch.allclose(got[span], want, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
        start += count


@pytest.mark.parametrize(
    ("heads", "steepest", "want"),
    [
        (4, 8, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, 8, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (2, 4, [2**-2, 2**-4]),
        (1, 8, [2**-8]),
    ],
)
def test_slopes_of_heads_that_are_no_power_of_two_fill_the_series_up(heads, steepest, want):
    assert alibi_slopes(heads, steepest) == want


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_learned_bias_is_computed_by_a_backend_that_can_and_never_left_out(backend, kv_heads):
    torch.manual_seed(0)
    bias = RelativeBias(torch.randn(12, 4), 25, bidirectional=False)
    spec = AttentionSpec(layer=0, heads=4, kv_heads=kv_heads, head_dim=16, scale=1.0, window=None, bias=bias)
    # Two rows with a token each and a chunk, over what lies in the cache already.
    ends, counts, tables = [50, 33, 40], [1, 1, 40], [[4, 1, 2, 9], [7, 5, 3], [6, 8, 10]]
    rows = [
        Row(sequence_id=i, token_ids=[0] * counts[i], position=ends[i] - counts[i], block_table=tables[i], sample=True)
        for i in range(3)
    ]
    past = [torch.randn(300, BLOCK, kv_heads, 16) for _ in range(2)]
    query, key, value = torch.randn(42, 4, 16), torch.randn(42, kv_heads, 16), torch.randn(42, kv_heads, 16)
    got = attended(backend, spec, torch.float32, rows, query, key, value, past)
    for start, (end, count, table) in enumerate(zip(ends, counts, tables, strict=True)):
        new = slice(start, start + count)
        keys, values = (
            torch.cat([old[table].flatten(0, 1)[: end - count], fresh[new]]).repeat_interleave(4 // kv_heads, 1)
            for old, fresh in zip(past, (key, value), strict=True)
        )
        queries = torch.arange(end - count, end)
        scores = torch.einsum("qhd,khd->hqk", query[new], keys) + bias(torch.arange(end), queries[None])[0]
        chances = scores.masked_fill(torch.arange(end) > queries[:, None], float("-inf")).softmax(-1)
        want = torch.einsum("hqk,khd->qhd", chances, values).flatten(1)
        assert torch.allclose(got[new], want, atol=1e-5)
