"""What the builder makes of a checkpoint's tensors before a layer sees them."""

import gc
import weakref

import pytest
import torch

from serving.errors import ModelError
from serving.layers.attention.select import select
from serving.layers.builder import LayerBuilder

CPU = torch.device("cpu")


class Tensors:
    def __init__(self, **tensors):
        self.tensors = tensors

    def has(self, name):
        return name in self.tensors

    def read(self, name):
        return self.tensors[name]


def builder(dtype=torch.float32, **tensors):
    return LayerBuilder(
        Tensors(**{name.replace("_", "."): tensor for name, tensor in tensors.items()}), dtype=dtype, device=CPU,
        attention=select("sdpa"),
    )  # fmt: skip


def test_interleaved_heads_come_out_as_separate_layers_side_by_side():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 8)  # each [groups, head_dim, in]
    mixed = torch.stack((query, key, value), 1).reshape(24, 8)
    bias, x = torch.arange(24.0), torch.randn(5, 8)
    layer = builder(qkv_weight=mixed, qkv_bias=bias).interleaved_column("qkv", 4, 1, 1, 1, bias=True)
    wanted_bias = bias.view(4, 3, 2).transpose(0, 1).flatten()
    want = torch.cat([x @ part.reshape(8, 8).t() for part in (query, key, value)], -1) + wanted_bias
    assert torch.allclose(layer(x), want, atol=1e-5)


def test_groups_may_hold_several_query_heads():
    mixed = torch.arange(8.0).view(8, 1)  # two groups of two queries, one key, one value, of one number each
    layer = builder(qkv_weight=mixed).interleaved_column("qkv", 2, 2, 1, 1)
    assert layer(torch.ones(1, 1)).tolist() == [[0, 1, 4, 5, 2, 6, 3, 7]]


def test_weights_kept_as_in_by_out_are_turned():
    weight, x = torch.randn(4, 6), torch.randn(3, 4)
    build = builder(up_weight=weight, fused_weight=weight).transposed()
    assert torch.allclose(build.column("up")(x), x @ weight, atol=1e-6)
    assert torch.allclose(build.fused_column("fused", 4, 2)(x), x @ weight, atol=1e-6)


def test_a_builder_that_nobody_needs_is_gone_at_once_and_its_tables_with_it():
    build = builder(wte_weight=torch.zeros(4, 2))
    build.at("").embedding("wte", 4)
    gc.disable()
    try:
        left = weakref.ref(build)
        del build
        assert left() is None
    finally:
        gc.enable()


def test_a_tensor_that_does_not_divide_is_named():
    build = builder(qkv_weight=torch.zeros(25, 8))
    with pytest.raises(ModelError, match=r"qkv has 25 outputs, but config.json says 24"):
        build.fused_column("qkv", 8, 8, 8)
    with pytest.raises(ModelError, match=r"qkv has 25 outputs"):
        build.interleaved_column("qkv", 4, 1, 1, 1)


def test_a_weight_near_one_keeps_its_distance_in_a_narrow_type():
    weight, x = torch.full((16,), 0.001), torch.randn(4, 16).bfloat16()
    got = builder(torch.bfloat16, norm_weight=weight).offset_norm("norm", 1e-6)(x)
    exact = torch.nn.functional.rms_norm(x.float(), (16,), 1 + weight.bfloat16().float(), 1e-6)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), exact, rtol=2**-8, atol=0)  # rounded once
