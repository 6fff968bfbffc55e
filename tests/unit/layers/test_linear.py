import pytest
import torch

from serving.layers.linear import Linear, PackedLinear, make_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 16, 63, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_the_packed_kernel_agrees_with_its_slow_twin(dtype, rows, biased):
    torch.manual_seed(0)
    weight = torch.randn(96, 64).to(dtype)
    bias = torch.randn(96).to(dtype) if biased else None
    x = torch.randn(rows, 64).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    for layer in (PackedLinear(weight, bias), Linear(weight, bias)):
        assert layer(x).dtype == dtype
        assert (layer(x) - exact).abs().max() <= bound


def test_in_float32_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    layer, x = PackedLinear(torch.randn(96, 64), None), torch.randn(128, 64)
    whole = layer(x)
    for rows in (1, 3, 16, 64, 127):
        assert torch.equal(layer(x[:rows]), whole[:rows])


def test_the_choice_falls_on_the_packed_kernel_where_the_cpu_has_it():
    assert isinstance(make_linear(torch.ones(4, 4), None), PackedLinear)
    assert isinstance(make_linear(torch.ones(4, 4, dtype=torch.float64), None), Linear)
