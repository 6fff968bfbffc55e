import pytest
import torch

from serving.layers.linear import Linear
from serving.layers.moe import Expert, GroupedExperts, LoopedExperts, Router, can_group, make_experts


def gate(x):
    gate, up = x.chunk(2, -1)
    return gate.relu() * up


def experts():
    torch.manual_seed(0)
    return [Expert(Linear(torch.randn(12, 8), None), Linear(torch.randn(8, 6), None)) for _ in range(5)]


def test_every_token_is_the_weighted_sum_of_those_it_chose():
    members, x = experts(), torch.randn(7, 8)
    router = Router(Linear(torch.randn(5, 8), None), 2, True)
    shares, ids = router(x)
    assert torch.allclose(shares.sum(-1), torch.ones(7))
    got = LoopedExperts(members, gate)(x, shares, ids)
    for i in range(7):
        parts = [
            share * members[chosen].down(gate(members[chosen].gate_up(x[i : i + 1])))
            for share, chosen in zip(shares[i], ids[i].tolist(), strict=True)
        ]
        assert torch.allclose(got[i], sum(parts)[0], atol=1e-4)


def test_shares_may_be_kept_as_they_are():
    shares, _ = Router(Linear(torch.randn(5, 8), None), 2, False)(torch.randn(3, 8))
    assert (shares.sum(-1) < 1).all()


def test_experts_that_nobody_chose_and_an_empty_batch_are_no_trouble():
    layer, x = LoopedExperts(experts(), gate), torch.randn(3, 8)
    ids = torch.tensor([[4, 0]] * 3)
    assert layer(x, torch.full((3, 2), 0.5), ids).shape == (3, 8)
    assert layer(x[:0], torch.zeros(0, 2), ids[:0]).shape == (0, 8)


def weights(experts, size, hidden, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return [
        (torch.randn(2 * size, hidden).to(device, dtype), torch.randn(hidden, size).to(device, dtype))
        for _ in range(experts)
    ]


def held_to_twin(pairs, dtype, device, tokens):
    twin = LoopedExperts([Expert(Linear(up, None), Linear(down, None)) for up, down in pairs], gate)
    layer = GroupedExperts(*(torch.stack(parts) for parts in zip(*pairs, strict=True)), gate)
    x = torch.randn(tokens, pairs[0][0].shape[1]).to(device, dtype)
    shares, ids = torch.rand(tokens, len(pairs), device=device).softmax(-1).topk(3, -1)
    ids[ids == 2] = 1  # whom nobody chose, and who was chosen twice
    exact = LoopedExperts([Expert(Linear(up.float(), None), Linear(down.float(), None)) for up, down in pairs], gate)
    exact, slow, got = exact(x.float(), shares, ids), twin(x, shares, ids).float(), layer(x, shares, ids)
    assert got.dtype == dtype
    assert (got.float() - exact).abs().mean() <= 1.1 * (slow - exact).abs().mean() + 1e-5 * exact.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_grouped_products_are_as_near_as_one_expert_after_another(dtype, tokens):
    held_to_twin(weights(6, 24, 16, dtype), dtype, "cpu", tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU found")
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_grouped_products_on_a_device(tokens):
    pairs = weights(6, 24, 16, torch.bfloat16, "cuda")
    assert can_group(pairs[0][0])
    assert isinstance(make_experts(iter(pairs), 6, gate), GroupedExperts)
    held_to_twin(pairs, torch.bfloat16, "cuda", tokens)


def test_a_cpu_keeps_the_loop():
    pairs = weights(3, 6, 8)
    layer = make_experts(iter(pairs), 3, gate)
    assert isinstance(layer, LoopedExperts)
    assert len(layer.experts) == 3
    x, shares, ids = torch.randn(2, 8), torch.rand(2, 2), torch.tensor([[0, 2], [1, 0]])
    want = LoopedExperts([Expert(Linear(up, None), Linear(down, None)) for up, down in pairs], gate)(x, shares, ids)
    assert torch.allclose(layer(x, shares, ids), want, atol=1e-4)


def test_stacked_weights_are_those_that_came(monkeypatch):
    monkeypatch.setattr("serving.layers.moe.can_group", lambda weight: True)
    pairs = weights(4, 8, 16)
    layer = make_experts(iter(pairs), 4, gate)
    assert torch.equal(layer.gate_up[3], pairs[3][0].t())
    assert torch.equal(layer.down[0], pairs[0][1].t())
