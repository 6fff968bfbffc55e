import json

import pytest

from serving.errors import ModelError
from serving.weights.model_config import ModelConfig

LLAMA = {
    "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def load(directory, config, generation=None):
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.load(directory)


def test_what_config_json_leaves_out_is_what_transformers_takes_for_granted(tmp_path):
    config = load(tmp_path, LLAMA)
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (4, 2, False)
    assert (config.rope["rope_type"], config.rope["rope_theta"]) == ("default", 10000.0)
    assert load(tmp_path, {**LLAMA, "model_type": "qwen3"}).head_dim == 128
    assert load(tmp_path, {**LLAMA, "model_type": "mistral"}).window(0) == 4096


def test_old_rope_scaling_and_new_rope_parameters_mean_the_same(tmp_path):
    old = load(tmp_path, {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = load(tmp_path, {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}})
    assert dict(old.rope) == dict(new.rope)


def test_phi3_called_longrope_by_other_names(tmp_path):
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    for name in ("su", "yarn", "longrope"):
        said = {**LLAMA, "model_type": "phi3", "rope_scaling": {"type": name, **factors}}
        assert load(tmp_path, said).rope["rope_type"] == "longrope"


def test_gemma3_scales_the_far_sighted_layers_only(tmp_path):
    old = {
        **LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    config = load(tmp_path, old)
    assert (config.rope["rope_type"], config.rope["factor"], config.rope["rope_theta"]) == ("linear", 8.0, 1e6)
    assert (config.local_rope["rope_type"], config.local_rope["rope_theta"]) == ("default", 1e4)
    assert [config.window(layer) for layer in range(6)] == [4096] * 5 + [None]


def test_a_number_that_one_family_has_is_named_where_it_is_none(tmp_path):
    config = load(tmp_path, {**LLAMA, "logit_scale": "big", "cap": None})
    with pytest.raises(ModelError, match="logit_scale"):
        config.number("logit_scale")
    with pytest.raises(ModelError, match="missing"):
        config.number("missing")
    with pytest.raises(ModelError, match="num_experts"):
        config.count("num_experts")
    assert config.optional_number("cap") is None


def test_end_of_sequence_ids_are_the_union_of_both_files(tmp_path):
    assert load(tmp_path, {**LLAMA, "eos_token_id": 2}, {"eos_token_id": [3, 4]}).eos_token_ids == {2, 3, 4}
    assert load(tmp_path, {**LLAMA, "eos_token_id": None}, {}).eos_token_ids == frozenset()


def test_qwen_windows_are_off_unless_switched_on(tmp_path):
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    assert load(tmp_path, qwen).window(1) is None
    on = load(tmp_path, {**qwen, "use_sliding_window": True})
    assert (on.window(0), on.window(1)) == (None, 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": -8}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_attention_heads": 1 << 40}, "num_attention_heads"),
        ({"model_type": ""}, "model_type"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_senseless_value_is_named(tmp_path, change, named):
    with pytest.raises(ModelError, match=named):
        load(tmp_path, {**LLAMA, **change})


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ModelError, match="not a directory"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        ModelConfig.load(tmp_path)
