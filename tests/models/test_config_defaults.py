"""What a config.json leaves out is what transformers takes for granted, for every architecture."""

import json

import pytest
from models.cases import CASES

from serving.errors import ModelError
from serving.models.select import ARCHITECTURES, select
from serving.weights.model_config import ModelConfig

FAMILIES = {config.model_type: type(config) for config in CASES.values()}
SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
POSITIONS = ("max_position_embeddings", "max_seq_len")
EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
ACTIVATION = ("hidden_activation", "hidden_act", "activation_function", "activation")
# What a family has fixed without a name for it, or under one of its own.
FIXED = {
    "dbrx": {"eps": 1e-5, "activation": "silu"}, "opt": {"eps": 1e-5}, "mpt": {"activation": "gelu"},
    "bloom": {"activation": "gelu_pytorch_tanh"},
}  # fmt: skip
# Where config.json always says it: sizes without which no checkpoint is written.
SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 16,
}  # fmt: skip


def first(config, names, otherwise=None):
    return next((getattr(config, name) for name in names if hasattr(config, name)), otherwise)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults(model_type, tmp_path):
    theirs = FAMILIES[model_type](**SIZES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES}))
    ours = ModelConfig.load(tmp_path)
    for name in SAME:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.max_position_embeddings == first(theirs, POSITIONS, 2048)
    shared = getattr(theirs, "multi_query", False)
    assert ours.num_key_value_heads == getattr(theirs, "num_key_value_heads", 1 if shared else 16)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4)
    assert ours.norm_eps == first(theirs, EPS, FIXED.get(model_type, {}).get("eps"))
    assert ours.hidden_act == first(theirs, ACTIVATION, FIXED.get(model_type, {}).get("activation"))
    assert ours.attention_bias == getattr(theirs, "attention_bias", False)
    types = getattr(theirs, "layer_types", None)
    for layer in range(12):
        full = types is not None and types[layer] == "full_attention"
        window = None if full else getattr(theirs, "sliding_window", None)
        off = getattr(theirs, "use_sliding_window", True) is False
        assert ours.window(layer) == (None if off else window)


@pytest.mark.parametrize(
    "model_type", [name for name, family in FAMILIES.items() if hasattr(family(), "rope_parameters")]
)
def test_rotation(model_type, tmp_path):
    theirs = FAMILIES[model_type](**SIZES).rope_parameters
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES}))
    ours = ModelConfig.load(tmp_path)
    for mine, layer_type in ((ours.rope, "full_attention"), (ours.local_rope, "sliding_attention")):
        their = theirs.get(layer_type, theirs)
        assert mine["rope_theta"] == their["rope_theta"]
        assert mine["partial_rotary_factor"] == their.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_one_family_alone_has(model_type, tmp_path):
    theirs = FAMILIES[model_type](**SIZES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES}))
    said = ModelConfig.load(tmp_path).said
    for name in (
        "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_bias", "qkv_bias",
        "use_parallel_residual", "num_experts_per_tok", "num_experts", "decoder_sparse_step", "logit_scale",
        "first_k_dense_replace", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "routed_scaling_factor", "topk_method", "n_group", "topk_group", "rope_interleave",
        "multi_query", "parallel_attn", "rotary_dim", "enable_bias", "do_layer_norm_before",
        "layer_norm_elementwise_affine",
    ):  # fmt: skip
        if getattr(theirs, name, None) is not None:
            assert said[name] == getattr(theirs, name), name


def test_what_stands_in_a_part_of_the_file_is_found(tmp_path):
    said = {
        "model_type": "dbrx", "d_model": 64, "n_heads": 8, "n_layers": 2, "max_seq_len": 77, "vocab_size": 100,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 500000, "model_type": ""},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 3, "ffn_act_fn": {"name": "gelu"}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours = ModelConfig.load(tmp_path)
    assert (ours.hidden_size, ours.num_key_value_heads, ours.max_position_embeddings) == (64, 2, 77)
    assert (ours.intermediate_size, ours.hidden_act, ours.rope["rope_theta"]) == (24, "gelu", 500000)
    assert (ours.count("num_experts"), ours.count("num_experts_per_tok")) == (5, 3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_with_senseless_sizes_is_refused_and_not_taken_for_an_unknown_family(model_type, tmp_path):
    sizes = dict.fromkeys(("hidden_size", "d_model", "n_embd"), "big")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 100, **sizes}))
    with pytest.raises(ModelError, match=r"config\.json: \w+ must be"):
        select(ModelConfig.load(tmp_path), tmp_path)


def test_a_new_architecture_needs_no_row_of_defaults(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "new", ARCHITECTURES["llama"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", **SIZES}))
    assert select(ModelConfig.load(tmp_path), tmp_path).__name__ == "llama"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", **SIZES, "hidden_size": "big"}))
    with pytest.raises(ModelError, match=r"config\.json: hidden_size must be"):
        select(ModelConfig.load(tmp_path), tmp_path)
