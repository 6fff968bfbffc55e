import json
import re

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


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": [2, 3]}, None, {2, 3}),
        ({}, {"eos_token_id": 4}, {4}),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, {2, 3, 4}),
        ({"eos_token_id": None}, {}, set()),
        ({"eos_token_id": []}, {"eos_token_id": None}, set()),
        ({"eos_token_id": [2, 10, 11]}, {"eos_token_id": 1 << 40}, {2}),  # of ten tokens
    ],
)
def test_end_of_sequence_ids_are_the_union_of_both_files(tmp_path, config, generation, ids):
    assert load(tmp_path, {**LLAMA, **config}, generation).eos_token_ids == ids


@pytest.mark.parametrize("value", ["</s>", 2.0, -1, True, [2, None], [2, -1], [2.5], ["2"], [[2]], {"id": 2}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_of_sequence_id_that_is_none_is_named_with_its_file(tmp_path, value, file):
    said = {"eos_token_id": value}
    config, generation = ({**LLAMA, **said}, {}) if file == "config.json" else (LLAMA, said)
    with pytest.raises(ModelError, match=f"^{re.escape(file)}: eos_token_id must be a token's id or a list of them"):
        load(tmp_path, config, generation)


def test_sampling_parameters_of_generation_config_are_no_defaults(tmp_path):
    sampling = {"temperature": 0.1, "top_k": 3, "do_sample": True, "max_length": 5, "repetition_penalty": 2.0}
    assert load(tmp_path, LLAMA, sampling) == load(tmp_path, LLAMA, {})


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    ],
)
def test_a_rope_scaling_changes_nothing_about_the_positions_that_the_file_says(tmp_path, scaling):
    for key in ("rope_scaling", "rope_parameters"):
        assert load(tmp_path, {**LLAMA, "max_position_embeddings": 256, key: scaling}).max_position_embeddings == 256


def test_positions_that_are_not_said_are_the_familys(tmp_path):
    assert load(tmp_path, LLAMA).max_position_embeddings == 2048
    assert load(tmp_path, {**LLAMA, "max_position_embeddings": None}).max_position_embeddings == 2048
    assert load(tmp_path, {**LLAMA, "model_type": "qwen3"}).max_position_embeddings == 32768


@pytest.mark.parametrize(("said", "name"), [("torch.bfloat16", "bfloat16"), ("float16", "float16"), (None, None)])
def test_a_type_goes_by_either_key_and_name(tmp_path, said, name):
    assert (
        load(tmp_path, {**LLAMA, "torch_dtype": said}).dtype == load(tmp_path, {**LLAMA, "dtype": said}).dtype == name
    )


def test_qwen_windows_are_off_unless_switched_on(tmp_path):
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    assert load(tmp_path, qwen).window(1) is None
    on = load(tmp_path, {**qwen, "use_sliding_window": True})
    assert (on.window(0), on.window(1)) == (None, 5)


def test_t5_has_names_of_its_own(tmp_path):
    said = {"model_type": "t5", "vocab_size": 10, "d_model": 8, "d_kv": 3, "d_ff": 20, "num_layers": 2, "num_heads": 4}
    config = load(tmp_path, {**said, "layer_norm_epsilon": 1e-5})
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (8, 20, 2)
    assert (config.num_attention_heads, config.head_dim, config.norm_eps) == (4, 3, 1e-5)
    assert config.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("said", "generation", "begins"),
    [
        ({"is_encoder_decoder": True, "decoder_start_token_id": 3}, {}, 3),
        ({"is_encoder_decoder": True, "decoder_start_token_id": 3}, {"decoder_start_token_id": 4}, 4),
        ({"is_encoder_decoder": True, "bos_token_id": 5}, {}, 5),
        ({"is_encoder_decoder": True, "decoder_start_token_id": 3, "bos_token_id": 5}, {"bos_token_id": 6}, 3),
        ({"decoder_start_token_id": 3}, {}, None),
        ({"model_type": "t5"}, {}, 0),
        ({"model_type": "bart", "num_attention_heads": None, "is_encoder_decoder": True, "bos_token_id": 5}, {}, 5),
    ],
)
def test_an_encoder_decoder_says_what_answers_begin_with(tmp_path, said, generation, begins):
    assert load(tmp_path, {**LLAMA, **said}, generation).decoder_start_token_id == begins


def test_an_encoder_decoder_that_does_not_is_refused(tmp_path):
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        load(tmp_path, {**LLAMA, "is_encoder_decoder": True, "decoder_start_token_id": 10})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": -8}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_attention_heads": 1 << 40}, "num_attention_heads"),
        ({"model_type": ""}, "model_type"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": [1, 2]}, "layer_types"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"vocab_size": 10.0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 16}, "head_dim must be a positive integer, not 0"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"max_position_embeddings": 1e30}, "max_position_embeddings"),
        ({"rms_norm_eps": "1e-6"}, "norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": 3}}, "full_attention must be an object"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ({"dtype": {"text": "float16"}}, "dtype must be a type's name"),
        ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers must be an integer from 0"),
        ({"vocab_size": [0] * 10_000}, r"not \[0, 0, 0, 0, 0, 0, \.\.\.\]"),
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
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        ModelConfig.load(tmp_path)


def test_of_an_unknown_family_only_what_nobody_names_otherwise_is_read(tmp_path):
    said = {"model_type": "nobody", "vocab_size": 10, "n_positions": 99, "num_attention_heads": [1, 2], "rope": "?"}
    config = load(tmp_path, {**said, "torch_dtype": "float16", "eos_token_id": 3})
    assert (config.vocab_size, config.max_position_embeddings, config.dtype) == (10, 99, "float16")
    assert config.eos_token_ids == {3}
    assert "hidden_size" in config.incomplete or "num_attention_heads" in config.incomplete
    with pytest.raises(ModelError, match="vocab_size"):
        load(tmp_path, {"model_type": "nobody", "vocab_size": "many"})
    with pytest.raises(ModelError, match="more than text"):
        load(tmp_path, {"model_type": "nobody", "text_config": {"vocab_size": 10}})
