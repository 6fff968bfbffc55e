"""What families of models leave unsaid in config.json, or say in words of their own.

Tables alone: knows no file and no layer.
"""

from collections.abc import Mapping
from typing import Any

# What transformers takes for granted where an architecture's config.json leaves a key out.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "gemma": {
        "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window_pattern": 2,
    },
    "phi3": {
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "mixtral": {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_experts_per_tok": 2, "num_local_experts": 8,
    },
    "qwen2_moe": {
        "num_key_value_heads": 16, "max_position_embeddings": 32768, "qkv_bias": True, "num_experts_per_tok": 4,
        "num_experts": 60, "decoder_sparse_step": 1, "sliding_window": 4096,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts_per_tok": 8, "num_experts": 128,
        "decoder_sparse_step": 1, "sliding_window": 4096,
    },
    "granite": {},
    "olmo2": {"rms_norm_eps": 1e-5},
    "starcoder2": {
        "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True,
        "rotary_pct": 0.25,
    },
    "gpt2": {
        "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "bloom": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "falcon": {
        "activation": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "multi_query": True,
        "parallel_attn": True,
    },
    "gpt_bigcode": {
        "n_positions": 1024, "activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "multi_query": True,
    },
    "gptj": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "rotary_dim": 64},
    "mpt": {"hidden_act": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "opt": {
        "activation_function": "relu", "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "enable_bias": True,
        "do_layer_norm_before": True, "layer_norm_elementwise_affine": True,
    },
    "phi": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "cohere": {
        "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.0625,
        "rope_theta": 500000.0,
    },
    "dbrx": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 1,
        "intermediate_size": 3584, "num_experts": 4, "num_experts_per_tok": 1, "attn_config": {}, "ffn_config": {},
        "layer_norm_eps": 1e-5,
    },
    "deepseek_v2": {
        "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536, "num_experts": 64, "moe_layer_freq": 1,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "max_position_embeddings": 4096, "num_key_value_heads": 128, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "num_experts": 256, "num_experts_per_tok": 8, "moe_layer_freq": 1, "n_group": 8,
        "topk_group": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_interleave": True,
    },
    "gemma3_text": {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
    },
    # Their positions are relative and have no end; `n_positions` is how long a text of either side was in training,
    # for mT5 by its paper (Xue et al. 2021, arXiv:2010.11934), whose config.json does not say it.
    "t5": {
        "n_positions": 512, "is_encoder_decoder": True, "decoder_start_token_id": 0, "tie_word_embeddings": True,
        "feed_forward_proj": "relu", "relative_attention_max_distance": 128,
    },
    "mt5": {
        "n_positions": 1024, "is_encoder_decoder": True, "decoder_start_token_id": 0, "tie_word_embeddings": True,
        "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128,
    },
    "umt5": {
        "n_positions": 1024, "is_encoder_decoder": True, "decoder_start_token_id": 0, "tie_word_embeddings": True,
        "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128,
    },
}  # fmt: skip
# What a few families call a thing by another name; a point leads into a part of config.json.
NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "ffn_config.ffn_hidden_size", "d_ff"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "attn_config.kv_n_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "hidden_act": ("hidden_activation", "activation_function", "activation", "ffn_config.ffn_act_fn.name"),
    "head_dim": ("qk_rope_head_dim", "d_kv"),
    "num_experts": ("num_local_experts", "n_routed_experts", "ffn_config.moe_num_experts"),
    "num_experts_per_tok": ("ffn_config.moe_top_k",),
    "rope_theta": ("rotary_emb_base", "attn_config.rope_theta"),
    "partial_rotary_factor": ("rotary_pct",),
}
# Trained in a wider type than float16, whose range they leave.
TOO_WIDE_FOR_FLOAT16 = ("mt5", "t5", "umt5")
