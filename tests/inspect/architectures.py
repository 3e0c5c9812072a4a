"""A tiny configuration for the architectures of mlx-lm: what a test builds and reads caches of, without computing."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

LAYERS = 6
_KINDS = ["full_attention", "sliding_attention", "sliding_attention"] * 2
_LINEAR = ["linear_attention", "linear_attention", "full_attention"] * 2
_GRANITE = {
    "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_proj_bias": False,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "dim", "n_embd", "d_model", "model_dim", "n_embed"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "hidden_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), 1e-5),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 2048),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group", "num_expert_group"), 1),
    "head_dim": 16,
    "layernorm_epsilon": 1e-5,
    "vocab_size": 300,
    "rope_theta": 10000.0,
    "sliding_window": 120,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": True,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "full_attention_interval": 3,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "query_pre_attn_scalar": 16.0,
    "attention_bias": False,
    "mlp_bias": False,
    "conv_L_cache": 3,
    "conv_bias": False,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "state_size": 8,
    "conv_kernel": 4,
    "time_step_rank": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
}

_TEXT: dict[str, Any] = {key: value for key, value in COMMON.items() if not key.startswith(("n_", "num_l", "dim"))}

SPECIAL: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": _KINDS},
    "apertus": {"post_norm": False, "qk_norm": True},
    "bailing_hybrid": {"layer_group_size": 3, "group_norm_size": 2, "num_key_value_heads": 4},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 3, "group_norm_size": 2, "num_key_value_heads": 4},
    "bailing_moe_v3": {},
    "cohere": {},
    "cohere2": {},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek": {},
    "deepseek_v2": {"rope_scaling": {"factor": 2, "type": "yarn", "original_max_position_embeddings": 512}},
    "deepseek_v3": {},
    "deepseek_v32": {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "exaone_moe": {"layer_types": _KINDS, "is_moe_layer": [False] * 2 + [True] * 4},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "gemma": {},
    "gemma2": {},
    "gemma3": {"text_config": {**_TEXT, "model_type": "gemma3_text"}},
    "gemma3_text": {},
    "gemma3n": {
        "text_config": {
            **_TEXT,
            "model_type": "gemma3n_text",
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 300,
            "rope_local_base_freq": 1e4,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "activation_sparsity_pattern": [0.0] * LAYERS,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 4,
        }
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "num_experts": None,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"use_qk_norm": True},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 64,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "rope_parameters": _ROPE,
    },
    "gpt2": {"num_key_value_heads": None},
    "gpt_bigcode": {},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "num_key_value_heads": None},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE,
        **_MAMBA2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba"] * 2,
    },
    "helium": {},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "moe_topk": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
    },
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "kimi_k25": {"text_config": {**_TEXT, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 2, 4, 5],
            "full_attn_layers": [3, 6],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        }
    },
    "lfm2": {"full_attn_idxs": [1, 4]},
    "lfm2_moe": {"full_attn_idxs": [1, 4], "use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {"block_size": 256},
    "llama": {"layer_types": _KINDS},
    "llama4": {
        "text_config": {
            **_TEXT,
            "attention_chunk_size": 512,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "model_type": "llama4_text",
            "use_qk_norm": True,
        }
    },
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 1,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {},
    "mamba2": {"n_groups": 1, "time_step_limit": [0.001, 0.1], "num_heads": 8, "state_size": 16},
    "mellum": {"layer_types": _KINDS, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 100,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_v_head_dim": 12,
    },
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1},
    "minicpm3": {
        "dim_model_base": 64,
        "scale_depth": 1.0,
        "scale_emb": 1,
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 512, "long_factor": [1.0] * 4},
    },
    "minimax": {"shared_intermediate_size": 32, "rotary_dim": 8},
    "ministral3": {
        "layer_types": _KINDS,
        "rope_parameters": {
            **_ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 512,
        },
    },
    "mistral3": {"text_config": {**_TEXT, "model_type": "llama"}},
    "mistral4": {
        "rope_parameters": {
            **_ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 512,
            "factor": 1.0,
        }
    },
    "mixtral": {},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
        ]
        * 2
    },
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "n_groups": 1,
        "hybrid_override_pattern": ["M", "*", "-", "M", "*", "-"],
        "time_step_limit": [0.0, 1e9],
        "use_bias": False,
        "residual_in_fp32": False,
    },
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {"layer_types": _LINEAR, "linear_allow_neg_eigval": True},
    "olmoe": {},
    "openelm": {
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4, 4, 8, 8, 8],
        "num_kv_heads": [1, 1, 2, 2, 2, 4],
        "ffn_multipliers": [1.0] * LAYERS,
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 64, "gegelu_limit": 20.0},
    "phimoe": {},
    "phixtral": {"rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"mamba_num_heads": 4, "hidden_size_per_head": 16, "mamba_d_state": 8, "mamba_step": 2},
    "plamo3": {"window_size": 120},
    "qwen": {"kv_channels": 16, "intermediate_size": 256},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": {"text_config": {**_TEXT, "model_type": "qwen2"}},
    "qwen3": {},
    "qwen3_5": {"text_config": {**_TEXT, "model_type": "qwen3_5", "num_experts": 0, "rope_parameters": None}},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_vl": {"text_config": {**_TEXT, "model_type": "qwen3"}},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 120,
        "num_key_value_heads": 1,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {"use_qkv_bias": False},
    "starcoder2": {},
    "step3p5": {"num_attention_groups": 2, "layer_types": _KINDS, "moe_top_k": 2},
    "telechat3": {},
    "youtu_llm": {},
}


def build(model_type: str, extra: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
    """A configuration and its model, with weights that are not computed."""
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    arguments = module.ModelArgs
    names = {field.name for field in dataclasses.fields(arguments)}
    common = {key: value for key, value in COMMON.items() if key in names}
    config = {"model_type": model_type, **common, **SPECIAL.get(model_type, {}), **(extra or {})}
    return config, module.Model(arguments.from_dict(dict(config)))


def filled(model: Any, tokens: int, chunk: int = 256) -> list[Any]:
    """The caches of one row with so many tokens, fed in chunks; shapes only."""
    caches: list[Any] = make_prompt_cache(model)
    while tokens > 0:
        fed = min(chunk, tokens)
        model(mx.zeros((1, fed), dtype=mx.uint32), cache=caches)
        tokens -= fed
    return caches
