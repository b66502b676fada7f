"""In one process: vLLM's own configuration for each case, and what the shim says to it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 256,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "torch_dtype": "float32",
}


def verdicts(
    cases: dict[str, dict[str, Any]], sets: dict[str, list[list[Any]]], size: int = 2
) -> dict[str, str]:
    """By case: the refusal of a configuration, or how it passed.

    cases: case -> arguments of EngineArgs; `model` adds to the model's config.json.
    sets: case -> [path, value] set on the finished configuration, for what vLLM does not let
        one configure on a CPU.
    """
    from vllm.engine.arg_utils import EngineArgs

    from oproj_patch import refusals
    from oproj_patch.errors import OprojError
    from oproj_patch.settings import Settings

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    told = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(MODEL | case.pop("model", {})))
            arguments = {
                "skip_tokenizer_init": True,
                "dtype": "float32",
                "data_parallel_size": 2,
                "enforce_eager": True,
                "max_model_len": 128,
                "enable_prefix_caching": False,
            }
            config = EngineArgs(
                model=directory,
                **arguments | case,  # type: ignore[arg-type]
            ).create_engine_config()
        for path, value in sets.get(name, []):
            *owners, attribute = path.split(".")
            owner: Any = config
            for part in owners:
                owner = getattr(owner, part)
            # The attribute exists in this release, unless it is one of older ones.
            owner.__dict__[attribute] = value
        ranks = config.parallel_config.data_parallel_size
        try:
            refusals.check(config, Settings(size=size), [list(range(ranks))])
            told[name] = f"passes with {ranks} data-parallel ranks"
        except OprojError as error:
            told[name] = str(error)
    return told
