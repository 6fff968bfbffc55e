"""adapter_config.json: what can be merged, and what is refused since it would be merged wrongly."""

import json
import math

import pytest

from serving.errors import ModelError
from serving.weights.adapter_config import AdapterConfig

# What peft 0.21 writes for a plain adapter.
PLAIN = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "org/base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def load(directory, **changes):
    (directory / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    return AdapterConfig.load(directory)


def test_what_peft_writes_is_read(tmp_path):
    config = load(tmp_path, revision="v2")
    assert (config.base, config.revision, config.fan_in_fan_out) == ("org/base", "v2", False)
    assert config.scale("model.layers.0.self_attn.q_proj", 8) == 2
    assert load(tmp_path).revision is None
    assert load(tmp_path, use_rslora=True).scale("q_proj", 16) == 4


@pytest.mark.parametrize("harmless", ["gaussian", "eva", "orthogonal", False, "Gaussian"])
def test_a_start_that_left_the_base_alone_is_merged(tmp_path, harmless):
    load(tmp_path, init_lora_weights=harmless)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"peft_type": None}, "of the kind None"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"invented_next_year": {"a": 1}}, "invented_next_year"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes its base"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes its base"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_way_out(tmp_path, changes, words):
    with pytest.raises(ModelError, match=words) as error:
        load(tmp_path, **changes)
    assert "merge_and_unload" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "does not hold a JSON object"),
        (json.dumps({**PLAIN, "base_model_name_or_path": None}), "names no base model"),
        (json.dumps({**PLAIN, "base_model_name_or_path": "a\nb"}), "names no base model"),
        (json.dumps({**PLAIN, "lora_alpha": "much"}), "is broken"),
        (json.dumps({**PLAIN, "lora_alpha": math.nan}), "is broken"),
        (json.dumps({**PLAIN, "lora_alpha": 10**400}), "is broken"),
        (json.dumps({**PLAIN, "alpha_pattern": ["q_proj"]}), "is broken"),
        (json.dumps({**PLAIN, "revision": 5}), "revision is 5"),
        (json.dumps({**PLAIN, "r": 0}), "the rank r is 0"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, words):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=words) as error:
        AdapterConfig.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("q_proj", "layers.0.q_proj"),
        (r"layers\.1\.mlp\.down_proj", "model.layers.1.mlp.down_proj"),
        ("^model.decoder.layers.0.k_proj", "model.decoder.layers.0.k_proj"),
        (r"layers\.\d+\.(q|k)_proj", "model.layers.12.k_proj"),
        (r"layers\.[0-9]+\..*_proj$", "model.layers.12.self_attn.k_proj"),
        ("k_proj|v_proj", "model.layers.0.v_proj"),
        (r".*\.v_proj", "model.layers.0.v_proj"),
    ],
)
def test_a_pattern_gives_a_module_its_alpha(tmp_path, key, module):
    config = load(tmp_path, alpha_pattern={key: 80})
    assert config.scale(module, 8) == 10
    assert config.scale("model.layers.0.mlp.gate_proj_", 8) == 2


@pytest.mark.parametrize(
    "patterns",
    [
        {"(a+)+": 1}, {"(a|a)*": 1}, {"(.|.)(.|.)": 1}, {"((a))": 1}, {"(a|b){9}": 1}, {".*.*.*": 1}, {"(": 1},
        {")(": 1}, {r"\1": 1}, {"(?=a)": 1}, {"(?P<a>b)": 1}, {"[z-a]": 1}, {"a" * 300: 1}, {"a\nb": 1},
        {f".*{i}": 1 for i in range(100)},
    ],
)  # fmt: skip
def test_a_pattern_that_could_take_forever_or_is_none_is_refused(tmp_path, patterns):
    with pytest.raises(ModelError, match=r"alpha_pattern has .*merge_and_unload") as error:
        load(tmp_path, alpha_pattern=patterns)
    assert "\n" not in str(error.value)


def test_the_longest_names_and_patterns_that_are_allowed_end(tmp_path):
    config = load(tmp_path, alpha_pattern={"(.*|.*)b": 1})
    assert config.scale("." * 256, 8) == 2
    with pytest.raises(ModelError, match="257 characters"):
        config.scale("a" * 257, 8)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="larger than 1048576 bytes"):
        AdapterConfig.load(tmp_path)


def test_patterns_are_only_so_many(tmp_path):
    patterns = {f"layers.{i}.q_proj": 8 for i in range(3000)}
    said = {"peft_type": "LORA", "base_model_name_or_path": "base", "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="alpha_pattern has 3000 keys"):
        AdapterConfig.load(tmp_path)
