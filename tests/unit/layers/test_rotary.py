"""Scaled rotary types against transformers' own frequencies, also beyond the length that a model was trained for."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from serving.errors import ModelError
from serving.layers.rotary import Rotary, make_partial_pair_rotation, make_partial_rotation, rotate, rotate_pairs

CPU, TRAINED, LONGEST, SIZE = torch.device("cpu"), 64, 256, 16
TYPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn-blunt": {"factor": 8.0, "truncate": False, "beta_fast": 16, "mscale": 0.7, "mscale_all_dim": 0.5},
    "longrope": {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def rope(name):
    return {"rope_type": name.split("-")[0], "rope_theta": 10000.0, **TYPES[name]}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("position", [0, 5, 63, 64, 100, 200])
def test_a_token_is_turned_as_when_transformers_decodes_it(name, position):
    trained = {"original_max_position_embeddings": TRAINED}
    # Dynamic scaling measures from the model's whole length, the others from the one they name.
    longest = TRAINED if name == "dynamic" else LONGEST
    config = LlamaConfig(
        hidden_size=2 * SIZE, num_attention_heads=2, max_position_embeddings=longest,
        rope_parameters={**rope(name), **({} if name == "dynamic" else trained)},
    )  # fmt: skip
    kind = name.split("-")[0]
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=position + 1)
    rotary = Rotary(SIZE, {**rope(name), **trained, "max_position_embeddings": longest}, CPU)
    cos, sin = rotary(torch.tensor([position]), torch.float32)
    want = position * frequencies
    assert torch.allclose(cos[0, 0], (want.cos() * scale).repeat(2), atol=1e-5)
    assert torch.allclose(sin[0, 0, SIZE // 2 :], want.sin() * scale, atol=1e-5)


def test_angles_depend_on_nothing_but_the_position():
    rotary = Rotary(SIZE, {**rope("dynamic"), "max_position_embeddings": TRAINED}, CPU)
    together = rotary(torch.tensor([3, 70, 200]), torch.float32)
    for i, position in enumerate((3, 70, 200)):
        alone = rotary(torch.tensor([position]), torch.float32)
        assert all(torch.equal(part[i], one[0]) for part, one in zip(together, alone, strict=True))


def test_an_unknown_type_and_a_missing_parameter_are_named():
    with pytest.raises(ModelError, match="spiral"):
        Rotary(SIZE, {"rope_type": "spiral", "rope_theta": 1.0}, CPU)
    short = {"short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 8}
    with pytest.raises(ModelError, match="short_factor must be a list of 8"):
        Rotary(SIZE, {"rope_type": "longrope", "rope_theta": 1e4, "max_position_embeddings": 16, **short}, CPU)
    with pytest.raises(ModelError, match="factor"):
        Rotary(SIZE, {"rope_type": "linear", "rope_theta": 1e4}, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_and_parts_are_the_same_turn_in_another_order(dtype):
    torch.manual_seed(0)
    angles = Rotary(8, {"rope_type": "default", "rope_theta": 1e4}, CPU)(torch.arange(7), dtype)
    x = torch.randn(7, 3, 12).to(dtype)
    apart = torch.cat((x[..., :8:2], x[..., 1:8:2]), -1)  # neighbours half a head apart
    turned = rotate(apart, angles)
    paired = torch.stack(turned.chunk(2, -1), -1).flatten(-2)
    assert torch.allclose(rotate_pairs(x[..., :8], angles), paired, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                          atol=5e-2 if dtype == torch.bfloat16 else 1e-6)  # fmt: skip
    pairs = make_partial_pair_rotation(CPU, dtype, 8)(x, angles)
    assert torch.equal(pairs[..., 8:], x[..., 8:])
    assert torch.allclose(pairs[..., :8].float(), rotate_pairs(x[..., :8], angles).float(), atol=5e-2)
    part = make_partial_rotation(CPU, dtype, 8)(x, angles)
    assert torch.equal(part[..., 8:], x[..., 8:])
    assert torch.allclose(part[..., :8].float(), rotate(x[..., :8], angles).float(), atol=5e-2)


@pytest.mark.parametrize("factor", ["x", None, [4.0], 0])
def test_numbers_of_a_type_that_make_no_sense_are_a_model_error(factor):
    with pytest.raises(ModelError, match="the numbers of rope_type 'linear' fail"):
        Rotary(SIZE, {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}, CPU)
