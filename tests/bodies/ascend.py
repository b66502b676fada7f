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
from types import SimpleNamespace
from typing import Any

import torch

from .world import whole

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
    from vllm_ascend.ascend_config import get_ascend_config, init_ascend_config

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
            if hasattr(utils, "set_weight_prefetch_method"):
                utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
            yield config
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def kernels() -> None:
    """Single NPU kernels of the layers around attention, in plain torch."""
    import torch_npu

    def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def npu_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6) -> Any:
        return rms(x, weight, epsilon), None

    def npu_add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6
    ) -> Any:
        total = x + residual
        return rms(total, weight, epsilon), None, total

    def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        gate, up = x.chunk(2, dim)
        return torch.nn.functional.silu(gate) * up

    torch_npu.npu_rms_norm = npu_rms_norm
    torch_npu.npu_add_rms_norm = npu_add_rms_norm
    torch_npu.npu_swiglu = npu_swiglu


def build(config: Any) -> Any:
    """The real model, with a synthetic checkpoint through its own `load_weights`."""
    from vllm.model_executor.model_loader import base_loader

    model = base_loader.initialize_model(config)
    model.load_weights(checkpoint(config.model_config.hf_config))
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)
    return model


def checkpoint(hf: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a DeepSeek checkpoint without experts, the same on every rank."""
    heads, hidden = hf.num_attention_heads, hf.hidden_size
    wide = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (hf.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (hf.vocab_size, hidden),
    }
    for index in range(hf.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (hf.intermediate_size, hidden),
            f"{layer}.mlp.up_proj.weight": (hf.intermediate_size, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, hf.intermediate_size),
            f"{layer}.self_attn.q_a_proj.weight": (hf.q_lora_rank, hidden),
            f"{layer}.self_attn.q_a_layernorm.weight": (hf.q_lora_rank,),
            f"{layer}.self_attn.q_b_proj.weight": (heads * wide, hf.q_lora_rank),
            f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (
                hf.kv_lora_rank + hf.qk_rope_head_dim,
                hidden,
            ),
            f"{layer}.self_attn.kv_a_layernorm.weight": (hf.kv_lora_rank,),
            f"{layer}.self_attn.kv_b_proj.weight": (
                heads * (hf.qk_nope_head_dim + hf.v_head_dim),
                hf.kv_lora_rank,
            ),
            f"{layer}.self_attn.o_proj.weight": (hidden, heads * hf.v_head_dim),
        }
    return [
        (name, whole(shape[0], shape[-1], torch.float32, seed=place)[: shape[0]])
        if len(shape) == 2
        else (name, torch.ones(shape))
        for place, (name, shape) in enumerate(sorted(shapes.items()))
    ]


class Attention:
    """Stands in for the kernels between an MLA implementation's input and its o_proj."""

    def __init__(self, layer: Any, impl: Any, hidden: int) -> None:
        self.columns = impl.num_heads * impl.v_head_dim
        self.mix = whole(self.columns, hidden, torch.float32, seed=7)
        layer.kv_cache = [(torch.empty(1, 1), torch.empty(1, 1))]
        impl._mla_preprocess = self.preprocess
        impl._forward_decode = self.decode

    def preprocess(self, _: Any, hidden_states: torch.Tensor, *__: Any, **___: Any) -> Any:
        return SimpleNamespace(
            ql_nope=hidden_states, q_pe=None, k_nope=None, k_pe=None, dequant_scale_q_nope=None
        ), None

    def decode(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states @ self.mix.t()


def metadata(rows: int) -> Any:
    """Of a batch of `rows` decoding requests, as far as the implementations' forward reads it."""
    return SimpleNamespace(
        num_actual_tokens=rows,
        num_input_tokens=rows,
        num_decodes=rows,
        num_prefills=0,
        num_decode_tokens=rows,
        attn_state=None,
        prefill=None,
        decode=SimpleNamespace(),
    )


def forward(model: Any, config: Any, rows: int, idle: bool, profile: bool = False) -> Any:
    """One forward pass of the real model in vllm-ascend's own context."""
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context

    names = [module.layer_name for module in model.modules() if hasattr(module, "impl")]
    told = None if idle else {name: metadata(rows) for name in names}
    dp = config.parallel_config.data_parallel_size
    # Made up, as where vllm-ascend skips its synchronisation: every entry is this rank's own.
    across = torch.full((dp,), rows, dtype=torch.int32)
    given: dict[str, Any] = {"num_tokens": rows, "num_tokens_across_dp": across}
    if profile:
        given["in_profile_run"] = True
    with torch.inference_mode(), set_ascend_forward_context(told, config, **given):
        tokens = torch.arange(rows) % 8
        return model(tokens, tokens, None)


def steps(model: str, dp: int, plan: list[list[int]], **engine: Any) -> dict[str, Any]:
    """The real model under `plan[step][rank]` rows; 0 is an idle rank, -n a profile run of n.

    Returns the errors against the same model with whole o_proj weights.
    """
    import oproj_patch

    with worker(model, dp, **engine) as config:
        kernels()
        built = build(config)
        hf = config.model_config.hf_config
        full = dict(checkpoint(hf))
        for module in built.modules():
            if hasattr(module, "impl"):
                Attention(module, module.impl, hf.hidden_size)
        mine = config.parallel_config.data_parallel_rank
        layers = [layer.self_attn for layer in built.model.layers]
        chunk = [attention.o_proj.weight.shape[1] for attention in layers]
        result: dict[str, Any] = {
            "class": type(layers[0].o_proj).__name__,
            "shapes": [list(attention.o_proj.weight.shape) for attention in layers],
            "exact": [
                torch.equal(
                    attention.o_proj.weight,
                    full[f"model.layers.{index}.self_attn.o_proj.weight"][
                        :, mine * chunk[index] : (mine + 1) * chunk[index]
                    ],
                )
                for index, attention in enumerate(layers)
            ],
            "errors": [],
            "scales": [],
        }
        outputs = []
        for counts in plan:
            count = counts[mine]
            outputs.append(
                forward(built, config, abs(count) or 1, idle=count <= 0, profile=count < 0)
            )
        status = oproj_patch.status()
        result |= {"exchanges": status.exchanges, "layers": status.layers}
        for index, attention in enumerate(layers):
            unsharded(attention.o_proj, full[f"model.layers.{index}.self_attn.o_proj.weight"])
        for counts, output in zip(plan, outputs, strict=True):
            count = counts[mine]
            expected = forward(built, config, abs(count) or 1, idle=count <= 0, profile=count < 0)
            result["errors"].append(float((output - expected).abs().max()))
            result["scales"].append(float(expected.abs().max()))
        return result


def unsharded(layer: Any, weight: torch.Tensor) -> None:
    """Let `layer` run with the whole weight and without any exchange."""
    from oproj_patch.row_parallel import ShardedMixin

    cls = type(layer)
    host = next(base for base in cls.__mro__[1:] if not issubclass(base, ShardedMixin)
                and base is not ShardedMixin)

    def plain(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        output = torch.nn.functional.linear(x, weight)
        return (output, None) if self.return_bias else output

    layer.__class__ = type(cls.__name__, (host,), {"forward": plain})
