import torch

from serving.layers.linear import Linear
from serving.layers.moe import Expert, LoopedExperts, Router


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
