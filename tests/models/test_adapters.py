"""Adapters merged while loading against transformers with the same weights merged by hand."""

import json
import math

import pytest
import torch
from models.cases import CASES, randomized
from models.hand_fed import Ours, row, worst_difference
from safetensors.torch import save_file

from serving.errors import ModelError
from serving.weights.adapter_file import PREFIX
from serving.weights.adapters import MergedCheckpoint
from serving.weights.checkpoint import SafetensorsCheckpoint

IDS = [(11 * i) % 131 for i in range(30)]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


class Adapter:
    """An adapter as peft saves one, and the merge that it means."""

    def __init__(self, directory, base="unused", **said):
        self.directory = directory
        self.said = {"peft_type": "LORA", "base_model_name_or_path": base, "lora_alpha": 8, "bias": "none", **said}
        self.tensors = {}
        self._draw = torch.Generator().manual_seed(5)

    def random(self, *shape):
        return torch.randn(shape, generator=self._draw)

    def lora(self, theirs, module, rank, scale, transposed=False):
        """Add matrices for a module, and `scale * B @ A` to its weight in transformers' model."""
        weight = theirs.get_parameter(f"{module}.weight")
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        a, b = self.random(rank, inputs), self.random(outputs, rank)
        self.tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        weight.data += scale * ((b @ a).T if transposed else b @ a)

    def whole(self, theirs, name, key=None):
        """Add a tensor that takes the place of the base's."""
        parameter = theirs.get_parameter(name)
        self.tensors[PREFIX + (key or name)] = tensor = self.random(*parameter.shape)
        parameter.data = tensor.clone()

    def save(self):
        self.directory.mkdir()
        (self.directory / "adapter_config.json").write_text(json.dumps(self.said))
        save_file(self.tensors, self.directory / "adapter_model.safetensors")
        return self.directory


def base(case, directory):
    theirs = randomized(CASES[case])
    theirs.save_pretrained(directory / "base")
    return theirs


def check_equal(theirs, directory, adapter):
    merged = MergedCheckpoint(SafetensorsCheckpoint(directory / "base"), adapter.save())
    (got,) = Ours(directory / "base", weights=merged).logits([row(0, IDS, 0, 30, list(range(1, 9)))])
    merged.check_all_used()
    with torch.inference_mode():
        assert worst_difference(got, theirs(torch.tensor([IDS])).logits[0]) < 1e-5


@pytest.mark.parametrize(("rank_stabilized", "divisor"), [(False, 4), (True, math.sqrt(4))])
def test_a_lora_is_added_to_the_weights_that_it_names(tmp_path, rank_stabilized, divisor):
    theirs = base("llama", tmp_path)
    adapter = Adapter(tmp_path / "adapter", r=4, use_rslora=rank_stabilized)
    for module in (Q, DOWN, "lm_head"):
        adapter.lora(theirs, module, 4, 8 / divisor)
    check_equal(theirs, tmp_path, adapter)


def test_patterns_give_modules_a_rank_and_an_alpha_of_their_own(tmp_path):
    theirs = base("llama", tmp_path)
    patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 32, "k_proj": 99}}
    adapter = Adapter(tmp_path / "adapter", r=4, **patterns)
    adapter.lora(theirs, Q, 4, 8 / 4)
    adapter.lora(theirs, DOWN, 3, 32 / 3)
    adapter.lora(theirs, "model.layers.0.mlp.down_proj", 3, 8 / 3)
    check_equal(theirs, tmp_path, adapter)


def test_matrices_that_lie_transposed_are_merged_transposed(tmp_path):
    theirs = base("gpt2", tmp_path)
    adapter = Adapter(tmp_path / "adapter", r=4, fan_in_fan_out=True)
    for module in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.h.2.attn.c_proj"):
        adapter.lora(theirs, module, 4, 8 / 4, transposed=True)
    check_equal(theirs, tmp_path, adapter)


def test_what_was_trained_whole_takes_the_place_of_the_bases(tmp_path):
    theirs = base("qwen2", tmp_path)
    adapter = Adapter(tmp_path / "adapter", r=4, bias="lora_only", modules_to_save=["lm_head", "embed_tokens"])
    adapter.lora(theirs, Q, 4, 8 / 4)
    adapter.whole(theirs, f"{Q}.bias", f"{Q}.base_layer.bias")
    adapter.whole(theirs, "model.embed_tokens.weight", "model.embed_tokens.modules_to_save.weight")
    adapter.whole(theirs, "lm_head.weight")
    check_equal(theirs, tmp_path, adapter)


def test_a_base_that_leaves_out_the_trunks_name_is_found(tmp_path):
    tmp_path.joinpath("base").mkdir()
    save_file({"h.0.attn.c_attn.weight": torch.zeros(8, 24)}, tmp_path / "base" / "model.safetensors")
    adapter = Adapter(tmp_path / "adapter", fan_in_fan_out=True)
    a, b = adapter.random(2, 8), adapter.random(24, 2)
    module = f"{PREFIX}transformer.h.0.attn.c_attn"
    adapter.tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    merged = MergedCheckpoint(SafetensorsCheckpoint(tmp_path / "base"), adapter.save())
    torch.testing.assert_close(merged.read("h.0.attn.c_attn.weight"), 4 * (b @ a).T)


def test_the_merge_is_computed_in_float32_and_rounded_once(tmp_path):
    tmp_path.joinpath("base").mkdir()
    adapter = Adapter(tmp_path / "adapter")
    weight, a, b = (adapter.random(*shape).bfloat16() for shape in ((16, 32), (4, 32), (16, 4)))
    save_file({"x.weight": weight}, tmp_path / "base" / "model.safetensors")
    adapter.tensors = {f"{PREFIX}x.lora_A.weight": a, f"{PREFIX}x.lora_B.weight": b}
    merged = MergedCheckpoint(SafetensorsCheckpoint(tmp_path / "base"), adapter.save()).read("x.weight")
    assert torch.equal(merged, (weight.float() + 2 * (b.float() @ a.float())).bfloat16())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{PREFIX}{Q}.lora_A.weight": (4, 64)}, "without its other half"),
        ({"lora.q.weight": (4, 64)}, "not named as peft names tensors"),
        ({f"{PREFIX}model.layers.9.mlp.up_proj.weight": (4, 4)}, "which the base model's weights do not hold"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector.weight": (64,)}, "of a kind that is not served"),
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": (4, 131)}, "of a kind that is not served"),
        ({f"{PREFIX}{Q}.lora_A.weight": (4, 63), f"{PREFIX}{Q}.lora_B.weight": (64, 4)}, "do not fit the base's"),
        ({f"{PREFIX}{Q}.lora_A.weight": (4, 64), f"{PREFIX}{Q}.lora_B.weight": (64, 5)}, "do not fit the base's"),
        ({f"{PREFIX}lm_head.weight": (132, 64)}, r"has the shape \[132, 64\] and the base's \[131, 64\]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_the_name_of_its_tensor(tmp_path, tensors, words):
    base("llama", tmp_path)
    adapter = Adapter(tmp_path / "adapter")
    adapter.tensors = {name: torch.zeros(shape) for name, shape in tensors.items()}
    directory = adapter.save()
    with pytest.raises(ModelError, match=words):
        Ours(tmp_path / "base", weights=MergedCheckpoint(SafetensorsCheckpoint(tmp_path / "base"), directory))


def test_a_tensor_that_no_layer_asked_for_is_named(tmp_path):
    theirs = base("llama", tmp_path)
    adapter = Adapter(tmp_path / "adapter")
    adapter.lora(theirs, DOWN, 2, 1)
    adapter.lora(theirs, Q, 2, 1)
    merged = MergedCheckpoint(SafetensorsCheckpoint(tmp_path / "base"), adapter.save())
    merged.read(f"{Q}.weight")
    with pytest.raises(ModelError, match=rf"{DOWN}.lora_A.weight belongs to no layer"):
        merged.check_all_used()


def test_missing_or_broken_adapter_weights_are_named(tmp_path):
    base("llama", tmp_path)
    adapter = Adapter(tmp_path / "adapter").save()
    for content in (None, b"short"):
        (adapter / "adapter_model.safetensors").unlink()
        if content is not None:
            (adapter / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"adapter_model.safetensors is missing, corrupt or truncated"):
            MergedCheckpoint(SafetensorsCheckpoint(tmp_path / "base"), adapter)
        (adapter / "adapter_model.safetensors").touch()


def test_a_float32_base_stays_as_it_is_and_is_merged_alike_when_it_is_read_again(tmp_path):
    tmp_path.joinpath("base").mkdir()
    adapter = Adapter(tmp_path / "adapter")
    weight, a, b = (adapter.random(*shape) for shape in ((16, 32), (4, 32), (16, 4)))
    save_file({"x.weight": weight}, tmp_path / "base" / "model.safetensors")
    adapter.tensors = {f"{PREFIX}x.lora_A.weight": a, f"{PREFIX}x.lora_B.weight": b}
    base = SafetensorsCheckpoint(tmp_path / "base")
    merged = MergedCheckpoint(base, adapter.save())
    first = merged.read("x.weight").clone()
    assert torch.equal(merged.read("x.weight"), first)
    assert torch.equal(base.read("x.weight"), weight)


def test_an_adapter_of_rank_0_is_refused(tmp_path):
    tmp_path.joinpath("base").mkdir()
    adapter = Adapter(tmp_path / "adapter")
    save_file({"x.weight": torch.zeros(16, 32)}, tmp_path / "base" / "model.safetensors")
    adapter.tensors = {f"{PREFIX}x.lora_A.weight": torch.zeros(0, 32), f"{PREFIX}x.lora_B.weight": torch.zeros(16, 0)}
    merged = MergedCheckpoint(SafetensorsCheckpoint(tmp_path / "base"), adapter.save())
    with pytest.raises(ModelError, match="rank 0"):
        merged.read("x.weight")
