"""Tiny configurations of DeepSeek V4: the published shapes, cut in heads, rank and hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .models import Config

if TYPE_CHECKING:
    from torch import Tensor

# hidden size / 16, groups; heads / 8 (one for each group), head size as it is; rank / 16
SHAPES = {"V4-Flash": (256, 8), "V4-Pro": (448, 16), "V4.1-Flash": (320, 8)}
RANK, HEAD_DIM = 64, 512


def config(hidden: int, groups: int, layers: int = 1, **fields: Any) -> Config:
    """Return a configuration without compression, which a CPU can run."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 320,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": groups,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 64,
        "o_groups": groups,
        "o_lora_rank": RANK,
        "sliding_window": 128,
        "compress_ratios": [0] * layers,
        "rms_norm_eps": 1e-6,
        "index_topk": 512,
        "index_n_heads": 8,
        "index_head_dim": 128,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 4,
        "hc_eps": 1e-6,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 64,
        "swiglu_limit": 10.0,
        "norm_topk_prob": True,
        "scoring_func": "sqrtsoftplus",
        "num_hash_layers": 0,
        "routed_scaling_factor": 1.5,
        "topk_method": "noaux_tc",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "expert_dtype": "bf16",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 256,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        **fields,
    }


def in_blocks(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight in fp8, its scales, and what both stand for, in float64.

    The scales, one for each 128 x 128 values, are powers of two, as in V4-Flash and V4-Pro.
    """
    import torch

    blocks = dense.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = 2.0 ** (blocks.abs().amax((1, 3)) / 448).log2().ceil()
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    weight = (dense / wide).to(torch.float8_e4m3fn)
    return weight, scale, weight.double() * wide.double()
