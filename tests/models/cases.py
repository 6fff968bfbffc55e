"""One tiny random configuration per architecture, for every test that holds our models to transformers.

Everything that ranks share out is divisible by four, but for the vocabulary; two key-value heads are fewer than that.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BlenderbotConfig,
    BloomConfig,
    CohereConfig,
    DbrxConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    MT5Config,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    PegasusConfig,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    T5Config,
    UMT5Config,
    VaultGemmaConfig,
    YoutuConfig,
)

_TINY = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WITHOUT_GROUPS = {key: value for key, value in _TINY.items() if key != "num_key_value_heads"}
_SMALL_GPT2 = {
    "vocab_size": 131, "n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 256, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

_LATENT = {
    **_TINY, "num_key_value_heads": _TINY["num_attention_heads"], "kv_lora_rank": 24, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
_DEEPSEEK_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.8,
    "mscale_all_dim": 0.6,
}  # fmt: skip
_DBRX_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_SMALL_OPT = {
    "vocab_size": 131, "hidden_size": 64, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 8,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_SMALL_MPT = {
    "vocab_size": 131, "d_model": 64, "n_layers": 3, "n_heads": 8, "max_seq_len": 256, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_SMALL_FALCON = {**_WITHOUT_GROUPS, "ffn_hidden_size": 80}

CASES: dict[str, PretrainedConfig] = {
    "bloom": BloomConfig(**_WITHOUT_GROUPS),
    "bloom-12-heads": BloomConfig(
        **{**_WITHOUT_GROUPS, "hidden_size": 96, "num_attention_heads": 12}, tie_word_embeddings=False,
        apply_residual_connection_post_layernorm=True,
    ),
    "falcon": FalconConfig(**_SMALL_FALCON),
    "falcon-large": FalconConfig(**_SMALL_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-large-one-norm": FalconConfig(
        **_SMALL_FALCON, new_decoder_architecture=True, num_kv_heads=4, num_ln_in_parallel_attn=1,
        tie_word_embeddings=False, rope_theta=500042.0,
    ),
    "falcon-serial-alibi": FalconConfig(
        **_SMALL_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon-large-alibi-12-heads": FalconConfig(
        **{**_SMALL_FALCON, "hidden_size": 96, "num_attention_heads": 12}, alibi=True, new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "gpt_bigcode": GPTBigCodeConfig(**_SMALL_GPT2),
    "gpt_bigcode-all-heads": GPTBigCodeConfig(
        **_SMALL_GPT2, multi_query=False, activation_function="gelu_fast", tie_word_embeddings=False
    ),
    "gptj": GPTJConfig(**_SMALL_GPT2, rotary_dim=4),
    "gptj-tied-whole": GPTJConfig(**_SMALL_GPT2, rotary_dim=8, n_inner=80, tie_word_embeddings=True),
    "mpt": MptConfig(**_SMALL_MPT),
    "mpt-12-heads": MptConfig(
        **{**_SMALL_MPT, "d_model": 96, "n_heads": 12}, attn_config={"clip_qkv": 0.7, "softmax_scale": 0.4},
        tie_word_embeddings=False,
    ),
    "opt": OPTConfig(**_SMALL_OPT),
    "opt-post-norm-narrow": OPTConfig(
        **_SMALL_OPT, do_layer_norm_before=False, word_embed_proj_dim=32, tie_word_embeddings=False
    ),
    "opt-narrow-bare": OPTConfig(
        **_SMALL_OPT, word_embed_proj_dim=32, enable_bias=False, layer_norm_elementwise_affine=False,
        activation_function="gelu",
    ),
    "opt-no-last-norm": OPTConfig(**_SMALL_OPT, _remove_final_layer_norm=True),
    "phi": PhiConfig(**_TINY),
    "phi-normed-tied": PhiConfig(**_TINY, qk_layernorm=True, partial_rotary_factor=0.25, tie_word_embeddings=True),
    "gemma": GemmaConfig(**_TINY, head_dim=16),
    "gemma2": Gemma2Config(
        **_TINY, head_dim=16, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **_TINY, head_dim=16, sliding_window=9, query_pre_attn_scalar=24, sliding_window_pattern=3,
    ),
    "cohere": CohereConfig(**_TINY, logit_scale=0.5),
    "cohere-normed": CohereConfig(**_TINY, logit_scale=0.5, use_qk_norm=True),
    "gpt2": GPT2Config(**_SMALL_GPT2),
    "gpt2-untied-scaled": GPT2Config(
        **_SMALL_GPT2, tie_word_embeddings=False, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_neox": GPTNeoXConfig(**_WITHOUT_GROUPS, rotary_pct=0.25 * 2),
    "gpt_neox-serial": GPTNeoXConfig(**_WITHOUT_GROUPS, rotary_pct=1.0, use_parallel_residual=False),
    "granite": GraniteConfig(
        **_TINY, attention_multiplier=0.3, residual_multiplier=0.6, embedding_multiplier=3.0, logits_scaling=2.5
    ),
    "dbrx": DbrxConfig(
        vocab_size=131, d_model=64, n_heads=8, n_layers=3, max_seq_len=256, rope_parameters=_DBRX_ROPE,
        attn_config={"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 3},
    ),
    "dbrx-unnormalized": DbrxConfig(
        vocab_size=131, d_model=64, n_heads=8, n_layers=3, max_seq_len=256, rope_parameters=_DBRX_ROPE,
        attn_config={"kv_n_heads": 4, "clip_qkv": 100, "rope_theta": 500000.0},
        ffn_config={
            "ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2, "moe_normalize_expert_weights": None,
            "ffn_act_fn": {"name": "gelu"},
        },
    ),
    "deepseek_v2": DeepseekV2Config(
        **_LATENT, q_lora_rank=20, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", n_shared_experts=2, routed_scaling_factor=3.0,
        rope_parameters=_DEEPSEEK_YARN,
    ),
    "deepseek_v2-lite": DeepseekV2Config(
        **_LATENT, q_lora_rank=None, n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=1
    ),
    "deepseek_v3": DeepseekV3Config(
        **_LATENT, q_lora_rank=20, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=1, rope_parameters={**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_v3-unpaired": DeepseekV3Config(
        **_LATENT, q_lora_rank=None, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1,
        n_shared_experts=2, norm_topk_prob=False, rope_interleave=False,
    ),
    "mixtral": MixtralConfig(**_TINY, num_local_experts=5, num_experts_per_tok=2, sliding_window=9),
    "qwen2_moe": Qwen2MoeConfig(
        **_TINY, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
    "qwen2_moe-window": Qwen2MoeConfig(
        **_TINY, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        use_sliding_window=True, sliding_window=9, qkv_bias=False,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_TINY, head_dim=16, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True,
        decoder_sparse_step=2, use_sliding_window=True, sliding_window=9,
    ),
    "olmo2": Olmo2Config(**_TINY),
    "phi3": Phi3Config(**_TINY, sliding_window=9),
    "phi3-partial-longrope": Phi3Config(
        **_TINY, original_max_position_embeddings=128, partial_rotary_factor=0.5,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
        },
    ),
    "starcoder2": Starcoder2Config(**_TINY, sliding_window=9),
    "starcoder2-unbiased": Starcoder2Config(**_TINY, use_bias=False, tie_word_embeddings=False),
    "llama-rope-dynamic": LlamaConfig(
        **_TINY, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama-rope-yarn": LlamaConfig(
        **_TINY,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64
        },
    ),
    "llama": LlamaConfig(**_TINY),
    "llama-biased-tied": LlamaConfig(**_TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-rope-llama3": LlamaConfig(**_TINY, rope_parameters=_LLAMA3_ROPE),
    "llama-rope-linear": LlamaConfig(
        **_TINY, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": MistralConfig(**_TINY, sliding_window=None),
    "mistral-window": MistralConfig(**_TINY, sliding_window=9),
    "qwen2": Qwen2Config(**_TINY),
    "qwen2-window": Qwen2Config(**_TINY, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**_TINY, head_dim=16),
    "qwen3-tied": Qwen3Config(**_TINY, head_dim=16, tie_word_embeddings=True),
}  # fmt: skip

_TINY_T5 = {
    "vocab_size": 131, "d_model": 64, "d_ff": 80, "d_kv": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 8,
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

# Those that read one text and write another.
ENCODER_DECODERS: dict[str, PretrainedConfig] = {
    "t5": T5Config(**_TINY_T5),
    "t5-gated-untied": T5Config(**_TINY_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": MT5Config(**_TINY_T5),
    "umt5": UMT5Config(**_TINY_T5),
}  # fmt: skip
_TINY_BART = {
    "vocab_size": 131, "d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 96,
    "decoder_start_token_id": 2,
}  # fmt: skip
# Without a file of ours: transformers' own class on our attention. Such models are not shared out over ranks.
FALLBACK_ENCODER_DECODERS: dict[str, PretrainedConfig] = {
    "bart": BartConfig(**_TINY_BART),
    "blenderbot": BlenderbotConfig(**_TINY_BART),
    "m2m_100": M2M100Config(**_TINY_BART),
    "marian": MarianConfig(**_TINY_BART, pad_token_id=130, scale_embedding=True),
    "mbart": MBartConfig(**_TINY_BART, scale_embedding=True),
    "pegasus": PegasusConfig(**_TINY_BART),
}  # fmt: skip
EVERY_ENCODER_DECODER = {**ENCODER_DECODERS, **FALLBACK_ENCODER_DECODERS}
# The same for a decoder alone.
FALLBACK_CASES: dict[str, PretrainedConfig] = {
    "exaone4-window": Exaone4Config(**_TINY, sliding_window=9, sliding_window_pattern=3),
    "helium-scaled": HeliumConfig(**_TINY, head_dim=8),
    "nemotron": NemotronConfig(**_TINY),
    "olmoe": OlmoeConfig(**_TINY, num_experts=4, num_experts_per_tok=2),
    "olmo-one-key": OlmoConfig(**{**_TINY, "num_key_value_heads": 1}),
    "persimmon": PersimmonConfig(**_WITHOUT_GROUPS),
    "smollm3": SmolLM3Config(**_TINY),
    "stablelm": StableLmConfig(**_TINY, use_qkv_bias=True),
    "vaultgemma-softcap": VaultGemmaConfig(
        **_TINY, head_dim=16, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "youtu-narrow-values": YoutuConfig(
        **{**_TINY, "num_key_value_heads": 8, "pad_token_id": None}, kv_lora_rank=16, q_lora_rank=24,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
    ),
}  # fmt: skip
EVERY_CASE = {**CASES, **FALLBACK_CASES}


def randomized(config):
    """A random transformers model whose norms and biases are random too: ones and zeros would hide a mix-up."""
    torch.manual_seed(0)
    # Written out, transformers adds Falcon's biases twice.
    implementation = "sdpa" if config.model_type == "falcon" else "eager"
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=implementation).eval()
    if not getattr(config, "scale_decoder_outputs", True):  # T5 says so where head and embedding differ
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in (model._keys_to_ignore_on_save or ()):  # computed, and never saved
                continue
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
            else:
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "final_logits_bias")):
                buffer.normal_(0, 0.3)
    return model
