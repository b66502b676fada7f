"""In a rank: the real vllm-ascend on a CPU, over gloo.

Stood in for here, in one place: what asks for a device (`torch.npu.current_device`, the cast to
the NPU's weight layout) and the dispatch key of vllm-ascend's own operators, CPU instead of
PrivateUse1. Single `torch_npu.npu_*` kernels are stood in for where a test needs them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# DeepSeek's architecture; every layer has an ordinary MLP, but the configuration is that of a
# mixture-of-experts model, so the ranks run in lock step.
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
}


def write_model(directory: Path, **changes: Any) -> str:
    """A model directory with nothing but a configuration; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**DEEPSEEK, **changes}))
    return str(directory)


def stand_in() -> None:
    """Import torch_npu and let vllm-ascend's device questions answer CPU."""
    import torch_npu
    from vllm import utils

    torch.npu.current_device = lambda: torch.device("cpu")
    torch_npu.npu_format_cast = lambda tensor, *_, **__: tensor
    try:
        from vllm.utils import torch_utils as home
    except ImportError:
        home = utils
    original = home.direct_register_custom_op

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "dispatch_key": "CPU"})

    home.direct_register_custom_op = utils.direct_register_custom_op = on_cpu


@contextlib.contextmanager
def worker(
    model: str, dp: int, tp: int = 1, dtype: str = "float32", **engine: Any
) -> Iterator[Any]:
    """What an NPUWorker does until its groups exist, for WORLD_SIZE ranks; yields VllmConfig."""
    stand_in()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    rank = int(os.environ["RANK"])
    load_general_plugins()
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "load_format": "dummy",
        "tensor_parallel_size": tp,
        "data_parallel_size": dp,
        "dtype": dtype,
        "distributed_executor_backend": "external_launcher",
        **engine,
    }
    config = EngineArgs(**arguments).create_engine_config()
    config.parallel_config.data_parallel_rank = rank // tp % dp
    from vllm_ascend import utils
    from vllm_ascend.ascend_config import init_ascend_config

    utils.adapt_patch()
    if hasattr(utils, "register_ascend_customop"):
        given = (config,) if utils.register_ascend_customop.__code__.co_argcount else ()
        utils.register_ascend_customop(*given)
    init_ascend_config(config)
    torch.set_default_dtype(getattr(torch, dtype))
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            dp * tp, rank, "tcp://127.0.0.1:" + os.environ["MASTER_PORT"], rank, "gloo"
        )
        try:
            parallel_state.ensure_model_parallel_initialized(tp, 1)
            from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel

            init_ascend_model_parallel(config.parallel_config)
            yield config
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def probe(model: str, dp: int, **engine: Any) -> dict[str, Any]:
    import oproj_patch

    with worker(model, dp, **engine) as config:
        from vllm.model_executor.model_loader.utils import initialize_model

        from vllm.model_executor.model_loader import base_loader

        built = base_loader.initialize_model(config)
        attention = built.model.layers[0].self_attn
        status = oproj_patch.status()
        return {
            "class": type(attention.o_proj).__name__,
            "shape": list(attention.o_proj.weight.shape),
            "impl": type(attention.mla_attn.mla_attn.impl).__name__,
            "seams": list(status.seams),
            "layers": status.layers,
        }
