"""What every architecture owes besides `test_matrix`: all tensors used, bfloat16, random weights, refusals."""

import copy
import json

import pytest
import torch
from models.cases import CASES, ENCODER_DECODERS, randomized
from models.hand_fed import CPU, Ours, row, worst_difference
from safetensors.torch import save_file
from transformers import DeepseekV2Config, Gemma3TextConfig, MptConfig

from serving.errors import ModelError
from serving.models.deepseek import is_sparse
from serving.models.select import ARCHITECTURES
from serving.runner.dummy import random_checkpoint
from serving.weights.model_config import ModelConfig


def test_every_tensor_of_the_checkpoint_is_used(pair):
    _, ours = pair
    assert [name for name in ours.weights.unread() if name != "lm_head.weight"] == []


def test_bfloat16_stays_near_float32(checkpoint):
    theirs, directory = checkpoint
    ids = [(11 * i) % 131 for i in range(30)]
    (got,) = Ours(directory, torch.bfloat16).logits([row(0, ids, 0, 30, list(range(1, 9)))])
    with torch.inference_mode():
        reference = theirs(torch.tensor([ids])).logits[0]
        theirs_in_bfloat16 = copy.deepcopy(theirs).bfloat16()(torch.tensor([ids])).logits[0].float()
    rounding = (theirs_in_bfloat16 - reference).abs().mean()
    assert (got - reference).abs().mean() < 1.5 * rounding


def test_long_chunks_attend_in_slices_and_wide_groups_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.runner.inputs.MAX_MASK_ENTRIES", 64)
    monkeypatch.setattr("serving.runner.inputs.MAX_GROUP_TOKENS", 24)
    theirs = randomized(CASES["mistral-window"])
    theirs.save_pretrained(tmp_path)
    ours = Ours(tmp_path)
    sequences = [[(i * 5 + j) % 131 for j in range(20)] for i in range(5)]
    tables = [list(range(1 + 5 * i, 6 + 5 * i)) for i in range(5)]
    with torch.inference_mode():
        want = theirs(torch.tensor(sequences)).logits
    chunks = ours.logits([row(i, ids, 0, 19, tables[i]) for i, ids in enumerate(sequences)])
    singles = ours.logits([row(i, ids, 19, 20, tables[i]) for i, ids in enumerate(sequences)])
    for i in range(5):
        assert worst_difference(torch.cat([chunks[i], singles[i]]), want[i]) < 1e-5


def test_random_weights_have_the_names_of_files(checkpoint):
    _, directory = checkpoint
    ours = Ours(directory, weights=random_checkpoint(directory, CPU, torch.float32))
    (logits,) = ours.logits([row(0, [1, 2, 3], 0, 3, [1])])
    assert logits.shape == (3, 131)
    assert logits.isfinite().all()


def assert_equal_logits(directory, theirs):
    ids = [(11 * i) % 131 for i in range(30)]
    (got,) = Ours(directory).logits([row(0, ids, 0, 30, list(range(1, 9)))])
    with torch.inference_mode():
        assert worst_difference(got, theirs(torch.tensor([ids])).logits[0]) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_files_without_a_prefix_are_read_too(family, tmp_path):
    theirs = randomized(CASES[family])
    theirs.config.save_pretrained(tmp_path)
    save_file(theirs.base_model.state_dict(), tmp_path / "model.safetensors")
    assert_equal_logits(tmp_path, theirs)


def test_santacoders_own_files_are_read_too(tmp_path):
    theirs = randomized(CASES["gpt_bigcode"])
    files = {}
    for name, tensor in theirs.state_dict().items():
        if ".c_attn." in name:
            files[name.replace("c_attn", "q_attn")], files[name.replace("c_attn", "kv_attn")] = tensor.split((64, 16))
        elif name != "lm_head.weight":
            files[name] = tensor
    kept_across = ("_attn.weight", "c_proj.weight", "c_fc.weight")
    save_file(
        {name: (x.t() if name.endswith(kept_across) else x).contiguous() for name, x in files.items()},
        tmp_path / "model.safetensors",
    )
    said = {**theirs.config.to_dict(), "model_type": "gpt2", "attention_head_type": "multiquery"}
    del said["multi_query"], said["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert_equal_logits(tmp_path, theirs)


@pytest.mark.parametrize(("case", "name"), [("falcon", "RefinedWebModel"), ("falcon-large", "RefinedWeb")])
def test_falcons_first_files_are_read_too(case, name, tmp_path):
    theirs = randomized(CASES[case])
    theirs.save_pretrained(tmp_path)
    said = {**theirs.config.to_dict(), "model_type": name, "n_head_kv": theirs.config.num_kv_heads}
    for key in ("num_kv_heads", "new_decoder_architecture", "num_ln_in_parallel_attn", "ffn_hidden_size"):
        del said[key]
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert_equal_logits(tmp_path, theirs)


def test_mpt_may_have_biases_everywhere(tmp_path):
    theirs = randomized(CASES["mpt"])
    for module in theirs.transformer.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.bias = torch.nn.Parameter(torch.randn(len(module.weight)))
    theirs.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, theirs)


def test_mpt_may_have_steeper_biases_of_scores(tmp_path):
    config = MptConfig(**{**CASES["mpt-12-heads"].to_dict(), "attn_config": {"alibi_bias_max": 4}})
    theirs = randomized(config)
    theirs.save_pretrained(tmp_path)
    # transformers leaves the number out.
    make = theirs.transformer.build_mpt_alibi_tensor
    theirs.transformer.build_mpt_alibi_tensor = lambda heads, length, device: make(heads, length, 4, device)
    assert_equal_logits(tmp_path, theirs)


def test_mpt_may_scale_its_logits(tmp_path):
    theirs = randomized(MptConfig(**{**CASES["mpt"].to_dict(), "logit_scale": 0.25}))
    theirs.save_pretrained(tmp_path)
    (got,) = Ours(tmp_path).logits([row(0, [5, 6, 7], 0, 3, [1])])
    with torch.inference_mode():  # transformers leaves the number out
        assert worst_difference(got, theirs(torch.tensor([[5, 6, 7]])).logits[0] * 0.25) < 1e-5


@pytest.mark.parametrize(("key", "value"), [("qk_ln", True), ("alibi", False), ("attn_type", "multiquery_attention")])
def test_an_mpt_that_transformers_cannot_compute_is_refused(key, value, tmp_path):
    randomized(MptConfig(**{**CASES["mpt"].to_dict(), "attn_config": {key: value}})).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"attn_config.{key} .* is not served"):
        Ours(tmp_path)


@pytest.mark.parametrize(("case", "key"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_positions_that_were_never_learned_are_refused(case, key, tmp_path):
    theirs = randomized(CASES[case])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**theirs.config.to_dict(), key: 257}))
    with pytest.raises(ModelError, match="rows, too few for the 257 positions"):
        Ours(tmp_path)


def test_a_model_of_embeddings_is_refused(tmp_path):
    config = Gemma3TextConfig(**{**CASES["gemma3_text"].to_dict(), "use_bidirectional_attention": True})
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bidirectional"):
        Ours(tmp_path, weights=random_checkpoint(tmp_path, CPU, torch.float32))


def test_a_choice_of_experts_that_is_not_known_is_refused(tmp_path):
    config = DeepseekV2Config(**{**CASES["deepseek_v2"].to_dict(), "topk_method": "noaux_tc"})
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="topk_method 'noaux_tc'"):
        Ours(tmp_path, weights=random_checkpoint(tmp_path, CPU, torch.float32))


def test_layers_may_be_mixtures_at_intervals(tmp_path):
    DeepseekV2Config(**CASES["deepseek_v2"].to_dict()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_layer_freq": 2}))
    config = ModelConfig.load(tmp_path)
    assert [is_sparse(config, layer) for layer in range(4)] == [False, False, True, False]


def test_every_architecture_has_a_case():
    assert {config.model_type for config in (CASES | ENCODER_DECODERS).values()} == set(ARCHITECTURES)
