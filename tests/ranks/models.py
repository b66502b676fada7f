"""Tiny configurations of real mixture-of-experts architectures, and vLLM's way to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

_COMMON: Config = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# vLLM's MLA on a CPU takes DeepSeek's head sizes only.
_MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "head_dim": 64,
}
_DEEPSEEK: Config = {
    **_COMMON,
    **_MLA,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
}
_V3: Config = {
    **_DEEPSEEK,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
}

CONFIGS: dict[str, Config] = {
    "deepseek_v3": _V3,
    "qwen3_moe": {
        **_COMMON,
        **_EXPERTS,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        **_COMMON,
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "kimi_vl": {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "torch_dtype": "float32",
        "media_placeholder_token_id": 120,
        "text_config": {**_V3, "architectures": ["DeepseekV3ForCausalLM"]},
        "vision_config": {
            "model_type": "moonvit",
            "patch_size": 14,
            "init_pos_emb_height": 8,
            "init_pos_emb_width": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "merge_kernel_size": [2, 2],
        },
    },
}


def write(config: Config, directory: Path) -> str:
    """Make `directory` a model of which only the configuration exists; return its path."""
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def engine_config(model: str, dtype: str = "float32") -> Any:
    """Return vLLM's configuration for a directory in which only `config.json` exists."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=model, skip_tokenizer_init=True, load_format="dummy", dtype=dtype,
        enforce_eager=True, max_model_len=128, max_num_batched_tokens=128, max_num_seqs=8,
        disable_log_stats=True,
    ).create_engine_config()  # fmt: skip
    config.additional_config = {}
    return config


def create(config: Any) -> Any:
    """Return the model, built by vLLM's own loader and not loaded yet."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype):
        loader = get_model_loader(config.load_config)
        return loader.create_model(vllm_config=config, model_config=config.model_config)
