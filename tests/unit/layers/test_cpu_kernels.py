"""Our CPU kernels against what they replace, in float32: each at least as near as torch's own operations."""

import pytest
import torch

from serving.layers import cpu_kernels
from serving.layers.activation import gelu_tanh, make_gate
from serving.layers.attention.select import fastest
from serving.layers.norm import NativeRMSNorm, RMSNorm, WideRMSNorm, make_rms_norm, make_wide_rms_norm
from serving.layers.rotary import (
    Rotary,
    make_pair_rotation,
    make_partial_rotation,
    make_rotation,
    rotate,
    rotate_pairs,
)

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(cpu_kernels.compiled_library() is None, reason="no C compiler when installing")


def as_near(got, twin, exact):
    assert got.dtype == twin.dtype == torch.bfloat16
    error, allowed = (got.float() - exact).abs(), (twin.float() - exact).abs()
    assert error.mean() <= 1.1 * allowed.mean() + 1e-6
    assert (error <= 2**-8 * exact.abs() + 1e-6).all()  # rounded once


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 48), (5, 3, 17), (300, 768)])
def test_norm(shape):
    torch.manual_seed(0)
    weight, x = torch.randn(shape[-1]).bfloat16(), (torch.randn(shape) * 30).bfloat16()
    exact = RMSNorm(weight.float(), 1e-6)(x.float())
    as_near(make_rms_norm(weight, 1e-6)(x), RMSNorm(weight, 1e-6)(x), exact)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 48), (5, 3, 17), (300, 768)])
def test_norm_with_a_finer_weight(shape):
    torch.manual_seed(0)
    weight, x = 1 + torch.randn(shape[-1]) / 500, (torch.randn(shape) * 30).bfloat16()
    exact = RMSNorm(weight, 1e-6)(x.float())
    as_near(make_wide_rms_norm(weight, 1e-6, torch.bfloat16)(x), WideRMSNorm(weight, 1e-6)(x), exact)
    wide = make_wide_rms_norm(weight, 1e-6, torch.float32)
    assert torch.allclose(wide(x.float()), exact, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 9, 200])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_rotation_of_a_strided_part(tokens, head_dim):
    torch.manual_seed(0)
    x = torch.randn(tokens, 5, head_dim).bfloat16().split((3, 2), 1)[0]
    rotary = Rotary(head_dim, {"rope_type": "default", "rope_theta": 1e4}, CPU)
    angles = rotary(torch.arange(tokens) * 7, torch.bfloat16)
    exact = rotate(x.float(), tuple(part.float() for part in angles))
    got, twin = make_rotation(CPU, torch.bfloat16)(x, angles), rotate(x, angles)
    assert (got.float() - exact).abs().mean() <= (twin.float() - exact).abs().mean() + 1e-6
    assert torch.allclose(got.float(), exact, rtol=2**-8, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 9, 200])
@pytest.mark.parametrize(("head_dim", "size"), [(16, 16), (24, 8), (80, 64)])
@pytest.mark.parametrize("pairs", [False, True])
def test_rotation_of_a_part_of_every_head_that_lies_within_another(tokens, head_dim, size, pairs):
    torch.manual_seed(0)
    x = torch.randn(tokens, 5, 10 + head_dim).bfloat16()[..., 10:]
    angles = Rotary(size, {"rope_type": "default", "rope_theta": 1e4}, CPU)(torch.arange(tokens) * 7, torch.bfloat16)
    turned = (rotate_pairs if pairs else rotate)(x[..., :size].float(), tuple(part.float() for part in angles))
    rotation = make_pair_rotation(CPU, torch.bfloat16) if pairs else make_partial_rotation(CPU, torch.bfloat16, size)
    got = rotation(x, angles)
    assert torch.allclose(got[..., :size].float(), turned, rtol=2**-8, atol=1e-6)
    assert torch.equal(got[..., size:], x[..., size:])


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize(("name", "activate"), [("silu", torch.nn.functional.silu), ("gelu_new", gelu_tanh)])
def test_gate(tokens, name, activate):
    torch.manual_seed(0)
    gate_up = (torch.randn(tokens, 2 * 37) * 8).bfloat16()
    gate_up[0, :4] = torch.tensor([200.0, -200.0, float("inf"), 0.0])
    gate, up = gate_up.double().chunk(2, -1)
    exact = (activate(gate) * up).float()
    got = make_gate(name, CPU, torch.bfloat16)(gate_up)
    assert torch.equal(got.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert torch.allclose(got.float()[finite], exact[finite], rtol=2**-7, atol=1e-6)


@needs_kernels
def test_a_not_a_number_stays_one():
    x = torch.ones(2, 16).bfloat16()
    x[1, 3] = float("nan")
    got = make_rms_norm(torch.ones(16).bfloat16(), 1e-6)(x)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


@needs_kernels
def test_attention_over_a_long_context_and_one_row_alone_is_the_same_as_in_a_batch():
    torch.manual_seed(0)
    kernels = cpu_kernels.load(CPU, torch.bfloat16)
    keys, values = (torch.randn(130, 16, 2, 64).bfloat16() for _ in range(2))
    query = torch.randn(2, 6, 64).bfloat16()
    tables, positions = torch.randperm(128).view(2, 64) + 1, torch.tensor([1023, 700])
    both = kernels.attend(query, keys, values, tables.view(-1), positions, 0.125, 0)
    for row in range(2):
        alone = kernels.attend(query[row : row + 1], keys, values, tables[row], positions[row : row + 1], 0.125, 0)
        assert torch.equal(alone[0], both[row])
        span = positions[row] + 1
        key, value = (kv[tables[row]].view(-1, 2, 64)[:span].float().transpose(0, 1) for kv in (keys, values))
        exact = torch.nn.functional.scaled_dot_product_attention(
            query[row].float().view(2, 3, 64), key, value, scale=0.125
        )
        assert torch.allclose(both[row].float(), exact.flatten(), rtol=2**-7, atol=1e-4)


def test_without_the_library_torch_computes(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "find_spec", lambda name: None)
    assert fastest(CPU, torch.bfloat16) == "matmul"
    assert not isinstance(make_rms_norm(torch.ones(4).bfloat16(), 1e-6), NativeRMSNorm)
    assert make_rotation(CPU, torch.bfloat16) is rotate
    assert make_pair_rotation(CPU, torch.bfloat16) is rotate_pairs
    angles = Rotary(4, {"rope_type": "default", "rope_theta": 1e4}, CPU)(torch.arange(3), torch.bfloat16)
    x = torch.randn(3, 2, 6).bfloat16()
    turned = make_partial_rotation(CPU, torch.bfloat16, 4)(x, angles)
    assert torch.equal(turned, torch.cat((rotate(x[..., :4], angles), x[..., 4:]), -1))
    gate_up = torch.tensor([[1.0, 2.0]]).bfloat16()
    assert make_gate("silu", CPU, torch.bfloat16)(gate_up).shape == (1, 1)


def test_heads_of_another_size_than_the_caches_are_refused_before_c_writes_them():
    kernels = cpu_kernels.load(torch.device("cpu"), torch.bfloat16)
    if kernels is None:
        pytest.skip("not compiled")
    cache, slots = torch.zeros(2, 16, 2, 8, dtype=torch.bfloat16), torch.tensor([3])
    with pytest.raises(RuntimeError, match=r"heads of \[2, 32\] for a cache of \[2, 8\]"):
        kernels.store(cache, torch.zeros(1, 2, 32, dtype=torch.bfloat16), slots)
    with pytest.raises(RuntimeError, match="4 heads of 32 for a cache"):
        kernels.attend(torch.zeros(1, 4, 32, dtype=torch.bfloat16), cache, cache, slots, slots, 1.0, 0)
