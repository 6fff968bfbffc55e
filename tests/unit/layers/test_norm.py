import pytest
import torch

from serving.layers.norm import MirroredRMSNorm, RMSNorm, make_rms_norm


@pytest.mark.parametrize("shape", [(1, 48), (5, 3, 16), (300, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_the_mirrored_norm_agrees_with_its_slow_twin(shape, dtype, tolerance):
    torch.manual_seed(0)
    weight = torch.randn(shape[-1]).to(dtype)
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    got, want = MirroredRMSNorm(weight, 1e-6)(x), RMSNorm(weight, 1e-6)(x)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance)


def test_a_row_of_one_sign_keeps_its_size():
    x = torch.full((2, 32), 3.0)  # a layer norm of x alone would be zero
    assert torch.allclose(MirroredRMSNorm(torch.ones(32), 0.0)(x), torch.ones(2, 32))


def test_the_choice_on_a_cpu():
    assert isinstance(make_rms_norm(torch.ones(4), 1e-6), MirroredRMSNorm)
