"""In a rank: the real vllm-ascend on a CPU, over gloo.

Stood in for here, in one place: what asks for a device (`torch.npu.current_device`, the cast to
the NPU's weight layout) and the dispatch key of vllm-ascend's own operators, CPU instead of
PrivateUse1. Single `torch_npu.npu_*` kernels are stood in for where a test needs them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
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


# What makes it DeepSeek V3.2, with sparse attention.
SPARSE: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 64,
    "index_n_heads": 8,
    "index_head_dim": 32,
}

QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_model(directory: Path, model: dict[str, Any] = DEEPSEEK) -> str:
    """A model directory with nothing but a configuration; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model))
    return str(directory)


def stand_in() -> None:
    """Import torch_npu and let vllm-ascend's device questions answer CPU."""
    import torch_npu
    from vllm import utils

    torch.npu.current_device = lambda: torch.device("cpu")
    torch.Tensor.npu = lambda self, *_, **__: self
    torch.version.cann = "9.0.0"
    torch_npu.npu_format_cast = lambda tensor, *_, **__: tensor
    try:
        from vllm.utils import torch_utils as home
    except ImportError:
        home = utils
    original = home.direct_register_custom_op

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "dispatch_key": "CPU"})

    home.direct_register_custom_op = utils.direct_register_custom_op = on_cpu


def import_worker() -> None:
    """The first import of vllm-ascend in a worker process; the order matters from 0.23."""
    try:
        importlib.import_module("vllm_ascend.worker.worker_v1")
    except ModuleNotFoundError:
        importlib.import_module("vllm_ascend.worker.worker")


def configured(model: str, dp: int, tp: int = 1, dtype: str = "float32", **engine: Any) -> Any:
    """The VllmConfig of this rank."""
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "load_format": "dummy",
        "tensor_parallel_size": tp,
        "data_parallel_size": dp,
        # With float32, vLLM 0.9.1 would go back to its first engine.
        "dtype": "bfloat16",
        "distributed_executor_backend": "external_launcher",
        **engine,
    }
    config = EngineArgs(**arguments).create_engine_config()
    config.model_config.dtype = getattr(torch, dtype)
    config.parallel_config.data_parallel_rank = int(os.environ["RANK"]) // tp % dp
    return config


@contextlib.contextmanager
def worker(
    model: str, dp: int, tp: int = 1, dtype: str = "float32", **engine: Any
) -> Iterator[Any]:
    """What an NPUWorker does until its groups exist, for WORLD_SIZE ranks; yields VllmConfig."""
    stand_in()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import linear
    from vllm.plugins import load_general_plugins

    rank = int(os.environ["RANK"])
    load_general_plugins()
    config = configured(model, dp, tp, dtype, **engine)
    import_worker()
    from vllm_ascend import utils
    from vllm_ascend.ascend_config import get_ascend_config, init_ascend_config

    utils.adapt_patch()
    if hasattr(utils, "register_ascend_customop"):
        given = (config,) if utils.register_ascend_customop.__code__.co_argcount else ()
        utils.register_ascend_customop(*given)
    init_ascend_config(config)
    if getattr(utils, "_ENABLE_NZ", 0) is None:
        utils.is_enable_nz(vllm_config=config)
        # Until 0.11, what else the worker's constructor does.
        with contextlib.suppress(ValueError):
            linear.WEIGHT_LOADER_V2_SUPPORTED.remove("UnquantizedLinearMethod")
    torch.set_default_dtype(getattr(torch, dtype))
    with set_current_vllm_config(config):
        # 0.9.1 adds the data-parallel rank itself, whatever the launcher.
        adds = "external_launcher" not in inspect.getsource(
            parallel_state.init_distributed_environment
        )
        world, place = (tp, rank % tp) if adds else (dp * tp, rank)
        config.parallel_config.data_parallel_master_port = int(os.environ["MASTER_PORT"])
        parallel_state.init_distributed_environment(
            world, place, "tcp://127.0.0.1:" + os.environ["MASTER_PORT"], rank, "gloo"
        )
        try:
            parallel_state.ensure_model_parallel_initialized(tp, 1)
            from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel

            first = next(iter(inspect.signature(init_ascend_model_parallel).parameters))
            init_ascend_model_parallel(
                *(
                    (dp * tp, config.parallel_config.lmhead_tp_size)
                    if first == "expert_parallel_size"
                    else (config.parallel_config,)
                )
            )
            if hasattr(utils, "set_weight_prefetch_method"):
                utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
            yield config
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def kernels() -> None:
    """Single NPU kernels of the layers around attention, in plain torch."""
    import torch_npu
    from vllm.platforms import current_platform

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
    # 0.9.1 makes a mask for its experts on the device in each forward context.
    type(current_platform).device_type = "cpu"
    torch_npu._npu_reshape_and_cache = lambda **_: None
    torch_npu._npu_rotary_embedding = lambda *_: None


def build(config: Any, experts: bool = True) -> Any:
    """The real model, with a synthetic checkpoint through its own `load_weights`.

    experts: the release may insist on a layer with experts.
    """
    from vllm.model_executor.model_loader import base_loader

    if experts:
        experts_stood_in(config)
    model = base_loader.initialize_model(config)
    model.load_weights(checkpoint(config.model_config.hf_config))
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)
    return model


def experts_stood_in(config: Any) -> None:
    """Some releases insist on a layer with experts: its last one, with an ordinary MLP in it."""
    hf = config.model_config.hf_config
    qwen = hf.architectures == QWEN["architectures"]
    module: Any = importlib.import_module(
        f"vllm.model_executor.models.{'qwen3_moe' if qwen else 'deepseek_v2'}"
    )
    if "layer found in" not in inspect.getsource(module):
        return
    hf.first_k_dense_replace = hf.num_hidden_layers - 1
    base: Any = module.Qwen3MoeMLP if qwen else module.DeepseekV2MLP

    class Dense(base):  # type: ignore[misc]
        experts = None
        gate = SimpleNamespace(e_score_correction_bias=None)
        n_logical_experts = n_physical_experts = n_local_physical_experts = 8
        n_routed_experts, n_shared_experts, n_redundant_experts = 8, 1, 0

        def __init__(self, *_: Any, prefix: str = "", **__: Any) -> None:
            super().__init__(hf.hidden_size, hf.intermediate_size, hf.hidden_act, prefix=prefix)

    name = "Qwen3MoeSparseMoeBlock" if qwen else "DeepseekV2MoE"
    setattr(module, name, Dense)
    # vllm-ascend 0.11 has a copy of the model, which took the name at import.
    copy: Any = sys.modules.get("vllm_ascend.models.deepseek_v3_2")
    if copy is not None:
        copy.DeepseekV2MoE = Dense


def checkpoint(hf: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint without experts or indexers, the same on every rank."""
    hidden = hf.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (hf.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (hf.vocab_size, hidden),
    }
    attention = _grouped_query(hf) if hasattr(hf, "num_experts") else _latent(hf)
    for index in range(hf.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (hf.intermediate_size, hidden),
            f"{layer}.mlp.up_proj.weight": (hf.intermediate_size, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, hf.intermediate_size),
        }
        shapes |= {f"{layer}.self_attn.{name}.weight": s for name, s in attention.items()}
    return [
        (name, whole(shape[0], shape[-1], torch.float32, seed=place)[: shape[0]])
        if len(shape) == 2
        else (name, torch.ones(shape))
        for place, (name, shape) in enumerate(sorted(shapes.items()))
    ]


def _latent(hf: Any) -> dict[str, tuple[int, ...]]:
    heads, hidden = hf.num_attention_heads, hf.hidden_size
    wide = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    return {
        "q_a_proj": (hf.q_lora_rank, hidden),
        "q_a_layernorm": (hf.q_lora_rank,),
        "q_b_proj": (heads * wide, hf.q_lora_rank),
        "kv_a_proj_with_mqa": (hf.kv_lora_rank + hf.qk_rope_head_dim, hidden),
        "kv_a_layernorm": (hf.kv_lora_rank,),
        "kv_b_proj": (heads * (hf.qk_nope_head_dim + hf.v_head_dim), hf.kv_lora_rank),
        "o_proj": (hidden, heads * hf.v_head_dim),
    }


def _grouped_query(hf: Any) -> dict[str, tuple[int, ...]]:
    hidden, wide = hf.hidden_size, hf.num_attention_heads * hf.head_dim
    narrow = hf.num_key_value_heads * hf.head_dim
    return {
        "q_proj": (wide, hidden),
        "k_proj": (narrow, hidden),
        "v_proj": (narrow, hidden),
        "q_norm": (hf.head_dim,),
        "k_norm": (hf.head_dim,),
        "o_proj": (hidden, wide),
    }


def kernels_stood_in(layer: Any) -> None:
    """Stand in for the kernels of one attention layer, by its implementation."""
    name = type(layer.impl).__name__
    if "MLA" in name:
        Attention(layer, layer.impl)
    elif "SFA" in name:
        SparseAttention(layer, layer.impl)
    else:
        GroupedQueryAttention(layer.impl)


class Attention:
    """Stands in for the kernels between an MLA implementation's input and its o_proj."""

    def __init__(self, layer: Any, impl: Any) -> None:
        self.columns = impl.num_heads * impl.v_head_dim
        # One cache per virtual engine, or the cache itself, according to the release.
        layer.kv_cache = torch.empty(2, 2, 2, 2)
        impl._mla_preprocess = self.preprocess
        impl._q_proj_and_k_up_proj = self.project
        impl.rotary_emb = lambda _, q_pe, k_pe: (q_pe, k_pe)
        impl._forward_decode = self.decode

    def preprocess(self, _: Any, hidden_states: torch.Tensor, *__: Any, **___: Any) -> Any:
        return SimpleNamespace(
            ql_nope=hidden_states, q_pe=None, k_nope=None, k_pe=None, dequant_scale_q_nope=None
        ), None

    def project(self, q_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q_c, torch.zeros(q_c.shape[0], 1, 1)

    def decode(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        mix = whole(self.columns, hidden_states.shape[-1], torch.float32, seed=7)
        return hidden_states @ mix.t()


class SparseAttention:
    """The same for an SFA implementation, whose steps have other names in 0.11."""

    def __init__(self, layer: Any, impl: Any) -> None:
        import torch_npu

        self.columns = impl.num_heads * impl.v_head_dim
        layer.kv_cache = torch.empty(4, 4, 4, 4)
        torch_npu.npu_scatter_nd_update_ = lambda *_: None
        if hasattr(impl, "_sfa_preprocess"):
            impl._sfa_preprocess = self.preprocess
            impl.apply_attention_fusion = self.fused
            return
        impl.enable_mlapo = False  # one fused kernel for all that follows
        impl.indexer_select_pre_process = lambda **_: (torch.zeros(1, 4), torch.zeros(1, 4))
        impl.indexer_select_post_process = lambda **_: None
        impl.exec_kv = lambda *_: (None, None)
        impl._q_proj_and_k_up_proj = lambda q_c: (q_c, None)
        impl.rope_single = lambda x, *_: x
        impl._execute_sparse_flash_attention_process = lambda query, *_: query
        torch.ops._C_ascend.npu_sparse_flash_attention = lambda query, **_: query  # in 0.13
        impl._v_up_proj = self.mixed

    def preprocess(self, hidden_states: torch.Tensor, *_: Any) -> Any:
        return SimpleNamespace(query_states=hidden_states, key_states=None, topk_indices=None), None

    def fused(self, query_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.mixed(query_states)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x @ whole(self.columns, x.shape[-1], torch.float32, seed=7).t()


class GroupedQueryAttention:
    """The query is the result; an idle rank's early return is the implementation's own."""

    def __init__(self, impl: Any) -> None:
        self.original = impl.forward
        impl.forward = self.forward

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, cache: Any, told: Any, **given: Any
    ) -> Any:
        if told is None:
            return self.original(layer, query, key, value, cache, told, **given)
        return given["output"].copy_(query.view_as(given["output"]))


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
        decode=SimpleNamespace(input_positions=torch.zeros(rows)),
        slot_mapping=torch.zeros(rows),
        cos=None,
        sin=None,
        cum_query_lens=None,
        seq_lens=None,
        block_tables=None,
        dcp_context=None,
        dsa_cp_context=None,
    )


def forward(model: Any, config: Any, rows: int, idle: bool, profile: bool = False) -> Any:
    """One forward pass of the real model in vllm-ascend's own context."""
    names = [module.layer_name for module in model.modules() if hasattr(module, "impl")]
    told = None if idle else {name: metadata(rows) for name in names}
    with torch.inference_mode(), forward_context(config, rows, told, profile):
        tokens = torch.arange(rows) % 8
        return model(tokens, tokens, None)


def forward_context(config: Any, rows: int, told: Any, profile: bool = False) -> Any:
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context

    dp = config.parallel_config.data_parallel_size
    # Made up, as where vllm-ascend skips its synchronisation: every entry is this rank's own.
    across = torch.full((dp,), rows, dtype=torch.int32)
    given: dict[str, Any] = {"num_tokens": rows, "num_tokens_across_dp": across}
    if profile:
        given["in_profile_run"] = True
    return set_ascend_forward_context(told, config, **given)


def model_steps(config: Any, built: Any, plan: list[list[int]]) -> dict[str, Any]:
    """The real model under `plan[step][rank]` rows; 0 is an idle rank, -n a profile run of n.

    Returns the errors against the same model with whole o_proj weights.
    """
    import oproj_patch

    hf = config.model_config.hf_config
    full = dict(checkpoint(hf))
    impls = []
    for module in built.modules():
        if hasattr(module, "impl"):
            kernels_stood_in(module)
            impls.append(module.impl)
    mine = config.parallel_config.data_parallel_rank
    layers = [layer.self_attn.o_proj for layer in built.model.layers]
    weights = [
        full[f"model.layers.{index}.self_attn.o_proj.weight"] for index in range(len(layers))
    ]
    before = oproj_patch.status().exchanges
    outputs = []
    for counts in plan:
        count = counts[mine]
        outputs.append(forward(built, config, abs(count) or 1, idle=count <= 0, profile=count < 0))
    result: dict[str, Any] = {
        "attention": type(impls[0]).__name__,
        "shapes": [list(layer.weight.shape) for layer in layers],
        "exact": [
            torch.equal(layer.weight, own_part(weight, config))
            for layer, weight in zip(layers, weights, strict=True)
        ],
        "exchanges": oproj_patch.status().exchanges - before,
        "errors": [],
        "scales": [],
    }
    for layer, weight in zip(layers, weights, strict=True):
        unsharded(layer, weight)
    for counts, output in zip(plan, outputs, strict=True):
        count = counts[mine]
        expected = forward(built, config, abs(count) or 1, idle=count <= 0, profile=count < 0)
        result["errors"].append(float((output - expected).abs().max()))
        result["scales"].append(float(expected.abs().max()))
    return result


def own_part(full: torch.Tensor, config: Any) -> torch.Tensor:
    """Of a full weight, the columns of this rank's heads, and of those this rank's part."""
    parallel = config.parallel_config
    tp, dp = parallel.tensor_parallel_size, parallel.data_parallel_size
    heads = full.chunk(tp, 1)[int(os.environ["RANK"]) % tp]
    return heads.chunk(dp, 1)[parallel.data_parallel_rank]


def unsharded(layer: Any, weight: torch.Tensor) -> None:
    """Let `layer` run with the whole weight of its heads and without any exchange of ours."""
    from vllm.distributed import get_tp_group

    from oproj_patch.row_parallel import ShardedMixin

    tp = get_tp_group()
    weight = weight.chunk(tp.world_size, 1)[tp.rank_in_group]

    cls = type(layer)
    host = next(
        base
        for base in cls.__mro__[1:]
        if not issubclass(base, ShardedMixin) and base is not ShardedMixin
    )

    def plain(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        output = tp.all_reduce(torch.nn.functional.linear(x, weight))
        return (output, None) if self.return_bias else output

    layer.__class__ = type(cls.__name__, (host,), {"forward": plain})


def quantization_kernels() -> None:
    """Single NPU kernels of the quantized linear methods, in plain torch."""
    import torch_npu

    def quantize(x: torch.Tensor, scale: torch.Tensor, offset: Any, *_: Any) -> torch.Tensor:
        # vllm-ascend passes the reciprocal scale, in the input's dtype.
        moved = x.float() * scale.float() + (0 if offset is None else offset.float())
        return moved.round().clamp(-128, 127).to(torch.int8)

    def npu_dynamic_quant(x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().amax(-1) / 127
        return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale

    def npu_quant_matmul(
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        pertoken_scale: torch.Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        **_: Any,
    ) -> torch.Tensor:
        total = x.long() @ weight.long()
        if bias is not None:
            total = total + bias.long()
        result = total.double() * scale.double()
        if pertoken_scale is not None:
            result = result * pertoken_scale.double().unsqueeze(-1)
        return result.to(output_dtype)

    def npu_weight_quant_batchmatmul(
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        antiquant_scale: torch.Tensor,
        antiquant_group_size: int,
        **_: Any,
    ) -> torch.Tensor:
        scale = antiquant_scale.double().repeat_interleave(antiquant_group_size, 0)
        return (x.double() @ (weight.double() * scale)).to(x.dtype)

    torch_npu.npu_quantize = quantize
    torch_npu.npu_dynamic_quant = npu_dynamic_quant
    torch_npu.npu_quant_matmul = npu_quant_matmul
    torch_npu.npu_weight_quant_batchmatmul = npu_weight_quant_batchmatmul
    torch_npu.npu_convert_weight_to_int4pack = lambda weight, *_: weight


def quant_config(description: dict[str, Any]) -> Any:
    try:
        from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig as config
    except ImportError:
        from vllm_ascend.quantization.quant_config import AscendQuantConfig as config
    made = config(description)
    # As vLLM's loader does from the model's class.
    made.packed_modules_mapping = {}
    return made


def quantized(
    config: Any, kind: str, place: int, columns: int = 256, hidden: int = 32
) -> dict[str, Any]:
    """The sharded layer against the same layer unsharded, both by vllm-ascend's quant method.

    The unsharded one has a name that is no o_proj's. Tensors go through each parameter's own
    weight loader.
    """
    from vllm.model_executor.layers.linear import RowParallelLinear

    names = [f"model.layers.{place}.self_attn.o_proj", f"model.layers.{place}.mlp.down_proj"]
    description = {f"{name}.weight": kind for name in names}
    config.quant_config = quant_config({**description, "group_size": 32})
    layer, reference = (
        RowParallelLinear(
            columns,
            hidden,
            bias=False,
            quant_config=config.quant_config,
            prefix=name,
            params_dtype=torch.bfloat16,
        )
        for name in names
    )
    mine = config.parallel_config.data_parallel_rank
    tp = config.parallel_config.tensor_parallel_size
    exact = {}
    for seed, (name, parameter) in enumerate(reference.named_parameters()):
        cut = getattr(parameter, "input_dim", None) is not None
        own = dict(layer.named_parameters())[name]
        full = drawn(
            name,
            (parameter.shape[0], *[n * tp if cut else n for n in parameter.shape[1:]]),
            parameter.dtype,
            seed,
        )
        own.weight_loader(own, full)
        parameter.weight_loader(parameter, full)
        part = own_part(full, config) if cut else full
        exact[name] = torch.equal(own.data, part.view_as(own.data))
    shapes = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    for target in (layer, reference):
        target.quant_method.process_weights_after_loading(target)
    x = whole(3 + 2 * mine, columns, torch.bfloat16, seed=50 + mine) * 4
    x = x.chunk(tp, 1)[int(os.environ["RANK"]) % tp].contiguous()
    with torch.inference_mode():
        output = layer(x)[0]
        expected = reference(x)[0]
    return {
        "method": type(layer.quant_method.quant_method).__name__,
        "class": type(layer).__name__,
        "shapes": shapes,
        "exact": exact,
        "error": float((output - expected).abs().max()),
        "scale": float(expected.abs().max()),
        # What the bias is worth in the result, where the method has one.
        "bias": float((layer.quant_bias.float() * layer.deq_scale.float()).abs().min())
        if hasattr(layer, "quant_bias")
        else 0.0,
    }


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A full tensor for a quantized layer's parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    if name == "weight":
        return torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    if name == "quant_bias":
        # Large: added once too often or not at all, it could not be missed.
        return torch.randint(2000, 4000, shape, generator=generator).to(torch.int32)
    if "offset" in name:
        return torch.zeros(shape, dtype=dtype)
    return (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)


def host(
    model: str,
    dp: int,
    plan: list[list[int]],
    kinds: Sequence[str] = (),
    others: Mapping[str, str] = MappingProxyType({}),
    drafts: list[list[int]] | None = None,
    tp: int = 1,
    **engine: Any,
) -> dict[str, Any]:
    """All that can be seen on one release with one start of the processes.

    others: name and directory of further models, built and run after the first; drafts: see
    `proposed`.
    """
    import oproj_patch

    with worker(model, dp, tp, **engine) as config:
        from vllm_ascend.ascend_config import get_ascend_config

        theirs = get_ascend_config()
        option = getattr(theirs, "finegrained_tp_config", theirs)
        kernels()
        quantization_kernels()
        built = build(config)
        status = oproj_patch.status()
        result: dict[str, Any] = {
            "option_seen_by_host": getattr(option, "oproj_tensor_parallel_size", None),
            "option_kept": config.additional_config,
            "size": status.size,
            "ranks": list(status.otp_ranks),
            "layers": status.layers,
            "seams": list(status.seams),
            "steps": attempt(lambda: model_steps(config, built, plan)),
        }
        for place, kind in enumerate(kinds, start=10):
            result[kind] = attempt(functools.partial(quantized, config, kind, place))
        if tp == 1:
            result["drafter"] = attempt(lambda: drafter_layer(config, 40, [[3, 5], [2, 1], [1, 4]]))
        if kinds and importlib.util.find_spec("vllm_ascend.ops.linear_op"):
            result["refused"] = attempt(lambda: layers_refused(config, 30))
        if drafts:
            result["proposer"] = attempt(
                functools.partial(proposed, model, dp, steps=3, plan=drafts, **engine)
            )
        for name, directory in others.items():
            result[name] = attempt(functools.partial(another, directory, dp, plan, **engine))
        with contextlib.suppress(ImportError):
            from vllm_ascend.models.deepseek_v2 import CustomDeepseekV2MLAAttention

            theirs.enable_prefill_optimizations = True
            result["scattering"] = attempt(
                lambda: one_attention(config, CustomDeepseekV2MLAAttention, 20)
            )
        return result


def layers_refused(config: Any, place: int) -> dict[str, str]:
    """What the check of a new layer says when the release had chosen otherwise for it."""
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm_ascend.ops import linear_op

    from oproj_patch.seams import vllm_ascend

    name = f"model.layers.{place}.self_attn.o_proj"
    config.quant_config = quant_config({f"{name}.weight": "W4A8_DYNAMIC", "group_size": 32})
    layer = RowParallelLinear(256, 32, bias=False, quant_config=config.quant_config, prefix=name)

    def told() -> str:
        return refused(lambda: vllm_ascend._check_layer(layer))

    def chosen(operator: str, tp: int) -> str:
        kind = getattr(linear_op, operator)
        layer.custom_op = kind.__new__(kind)
        with changed(layer.oproj.group, "tp_size", tp):
            return told()

    result = {
        "nothing": told(),
        "its own o_proj": chosen("OProjRowParallelOp", 1),
        "sequence parallel": chosen("SequenceRowParallelOp", 2),
        "sequence parallel without TP": chosen("SequenceRowParallelOp", 1),
        "left": str(layer.custom_op),
    }
    layer.input_size_per_partition = 40
    result["half a group"] = told()
    layer.input_size_per_partition = 128
    module = next(
        name
        for name in ("methods.w4a4_flatquant", "w4a4_flatquant_dynamic")
        if importlib.util.find_spec(f"vllm_ascend.quantization.{name.split('.')[0]}")
    )
    flat = importlib.import_module(f"vllm_ascend.quantization.{module}")
    kind = flat.AscendW4A4FlatQuantDynamicLinearMethod
    layer.quant_method.quant_method = kind.__new__(kind)
    result["flatquant"] = told()
    return result


def drafter_layer(config: Any, place: int, rows: list[list[int]]) -> dict[str, Any]:
    """The o_proj of a drafter: several steps in one forward context, `rows` by step and rank."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    import oproj_patch

    name = f"model.layers.{place}.self_attn.o_proj"
    layer = RowParallelLinear(256, 64, bias=False, prefix=name)
    weight = whole(64, 256, torch.float32, seed=3)
    layer.weight.weight_loader(layer.weight, weight)
    mine = config.parallel_config.data_parallel_rank
    before = oproj_patch.status().exchanges
    errors = []
    with torch.inference_mode(), forward_context(config, rows[0][mine], None):
        for step, counts in enumerate(rows):
            x = whole(counts[mine], 256, torch.float32, seed=10 * step + mine)
            errors.append(float((layer(x)[0] - x @ weight.t()).abs().max()))
    return {"errors": errors, "exchanges": oproj_patch.status().exchanges - before}


def proposed(
    model: str, dp: int, steps: int, plan: list[list[int]], **engine: Any
) -> dict[str, Any]:
    """The real MTP model under vllm-ascend's own proposer, `steps` drafted tokens a request.

    plan: rows by pass and rank, all of one request; 0 is an idle rank, whose proposer runs its
    own dummy pass. Returns exchanges by pass and whether the unsharded model drafts the same.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader

    import oproj_patch

    told = {"method": "mtp", "num_speculative_tokens": steps}
    config = configured(model, dp, speculative_config=told, **engine)
    with set_current_vllm_config(config):
        draft = config.speculative_config.draft_model_config
        built = base_loader.initialize_model(config, model_config=draft)
        built.load_weights(draft_checkpoint(draft.hf_config))
        block = built.model.layers[str(draft.hf_config.num_hidden_layers)].mtp_block
        attentions = [module for module in built.modules() if hasattr(module, "impl")]
        for module in attentions:
            kernels_stood_in(module)
        proposer = proposer_of(config, built)
        mine = config.parallel_config.data_parallel_rank

        def run(rows: int) -> Any:
            proposer.input_ids.copy_(torch.arange(16) % 8)
            proposer.positions.copy_(torch.arange(16))
            proposer.hidden_states.copy_(whole(16, 64, torch.float32, seed=5))
            with torch.inference_mode():
                if not rows:
                    return proposer.dummy_run(1)
                layers = {module.layer_name: metadata(rows) for module in attentions}
                with forward_context(config, rows, layers):
                    drafted: torch.Tensor = proposer._run_merged_draft(
                        num_input_tokens=rows,
                        batch_size=1,
                        token_indices_to_sample=torch.tensor([rows - 1]),
                        target_positions=None,
                        inputs_embeds=None,
                        multi_steps_attn_metadata=[layers] * steps,
                        num_tokens=rows,
                    )
            return [drafted.tolist(), proposer.hidden_states[0].clone()]

        result: dict[str, Any] = {"exchanges": [], "errors": [], "tokens": []}
        outputs = []
        for counts in plan:
            before = oproj_patch.status().exchanges
            outputs.append(run(counts[mine]))
            result["exchanges"].append(oproj_patch.status().exchanges - before)
        layer = block.self_attn.o_proj
        result["shape"] = list(layer.weight.shape)
        full = dict(draft_checkpoint(draft.hf_config))
        unsharded(layer, next(w for name, w in full.items() if name.endswith("o_proj.weight")))
        before = oproj_patch.status().exchanges
        for counts, output in zip(plan, outputs, strict=True):
            expected = run(counts[mine])
            if counts[mine]:
                result["tokens"].append([output[0], expected[0]])
                # What the last step was given: the hidden states of the one before.
                result["errors"].append(float((output[1] - expected[1]).abs().max()))
        result["unsharded exchanges"] = oproj_patch.status().exchanges - before
        return result


def draft_checkpoint(hf: Any) -> list[tuple[str, torch.Tensor]]:
    """`checkpoint` of the one layer of an MTP model."""
    place, hidden = hf.num_hidden_layers, hf.hidden_size
    own = f"model.layers.{place}"
    tensors = [
        (name.replace("model.layers.0", own), tensor)
        for name, tensor in checkpoint(hf)
        if name.startswith("model.layers.0.")
    ]
    return [
        *tensors,
        (f"{own}.embed_tokens.weight", whole(hf.vocab_size, hidden, torch.float32, seed=90)),
        (f"{own}.shared_head.head.weight", whole(hf.vocab_size, hidden, torch.float32, seed=91)),
        (f"{own}.shared_head.norm.weight", torch.ones(hidden)),
        (f"{own}.eh_proj.weight", whole(hidden, 2 * hidden, torch.float32, seed=92)),
        (f"{own}.enorm.weight", torch.ones(hidden)),
        (f"{own}.hnorm.weight", torch.ones(hidden)),
    ]


def proposer_of(config: Any, model: Any) -> Any:
    """vllm-ascend's proposer with what its passes read; its constructor allocates on the NPU."""
    from vllm.config import CUDAGraphMode
    from vllm_ascend.spec_decode.eagle_proposer import AscendEagleProposer

    dp = config.parallel_config.data_parallel_size

    def synchronised(rows: int, **_: Any) -> Any:
        return rows, torch.full((dp,), rows, dtype=torch.int32), CUDAGraphMode.NONE

    proposer = AscendEagleProposer.__new__(AscendEagleProposer)
    given: dict[str, Any] = {
        "model": model,
        "method": "mtp",
        "vllm_config": config,
        "draft_model_config": config.speculative_config.draft_model_config,
        "num_speculative_tokens": config.speculative_config.num_speculative_tokens,
        "runner": SimpleNamespace(
            _sync_metadata_across_dp=synchronised, attn_groups=[], max_num_reqs=4
        ),
        "device": torch.device("cpu"),
        "input_ids": torch.zeros(16, dtype=torch.int64),
        "positions": torch.zeros(16, dtype=torch.int64),
        "hidden_states": torch.zeros(16, 64),
        "arange": torch.arange(16),
        "token_indices_to_sample": torch.zeros(16, dtype=torch.int64),
        "pass_hidden_states_to_model": True,
        "extra_slots_per_request": 1,
        "pcp_size": 1,
        "dcp_size": 1,
        "uses_xdrope_dim": 0,
        "_runnable": proposer._run_merged_draft,
    }
    names = ("use_cuda_graph", "uses_mrope", "supports_mm_inputs", "parallel_drafting",
             "is_multimodal_model", "enable_shared_expert_dp", "_share_mtp_indices")  # fmt: skip
    vars(proposer).update(given, **dict.fromkeys(names, False))
    return proposer


def another(model: str, dp: int, plan: list[list[int]], **engine: Any) -> dict[str, Any]:
    """`model_steps` of one more model in the same processes and groups."""
    from vllm.config import set_current_vllm_config

    config = configured(model, dp, **engine)
    with set_current_vllm_config(config):
        return model_steps(config, build(config), plan)


def one_attention(config: Any, attention: Any, place: int) -> dict[str, Any]:
    """The o_proj of an attention made by its real constructor, as layer `place` of a model."""
    from oproj_patch.row_parallel import ShardedMixin
    from oproj_patch.seams import vllm_ascend

    hf = config.model_config.hf_config
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank")
    made = attention(
        config=hf,
        hidden_size=hf.hidden_size,
        num_heads=hf.num_attention_heads,
        **{name: getattr(hf, name) for name in names},
        max_position_embeddings=hf.max_position_embeddings,
        prefix=f"model.layers.{place}.self_attn",
    )
    layer = made.o_proj
    weight = whole(hf.hidden_size, hf.num_attention_heads * hf.v_head_dim, torch.float32, seed=1)
    layer.weight.weight_loader(layer.weight, weight)
    mine = config.parallel_config.data_parallel_rank
    x = whole(3 + mine, weight.shape[1], torch.float32, seed=2 + mine)
    with torch.inference_mode():
        output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    result: dict[str, Any] = {
        "class": type(layer).__name__,
        "sharded": isinstance(layer, ShardedMixin),
        "shape": list(layer.weight.shape),
        "error": float((output - x @ weight.t()).abs().max()),
        "refusal": "",
    }
    # The same layer with two tensor-parallel ranks.
    group = layer.oproj.group
    group.tp_size = 2
    try:
        vllm_ascend._check_layer(layer)
    except Exception as error:
        result["refusal"] = str(error)
    finally:
        group.tp_size = 1
    return result


def attempt(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `body`, or its error: one failure must not hide the other results."""
    try:
        return body()
    except Exception as error:
        traceback.print_exc()
        return {"error_raised": f"{type(error).__name__}: {error}"}


def alone(model: str, option: dict[str, Any]) -> dict[str, Any]:
    """What one process refuses before any group exists: the sentences, by what was asked for."""
    stand_in()
    from vllm.config import set_current_vllm_config

    told = {"both": refused(lambda: configured(model, 2, additional_config=option))}
    config = configured(model, 2)
    import_worker()
    from vllm_ascend import utils

    utils.adapt_patch()
    with set_current_vllm_config(config):
        told |= configurations_refused(config)
        told |= hosts_refused()
    return told


def refused(body: Callable[[], Any]) -> str:
    from oproj_patch.errors import OprojError

    try:
        body()
    except OprojError as error:
        return str(error)
    return ""


def configurations_refused(config: Any) -> dict[str, str]:
    """Each conflict put into the release's own configuration objects, alone."""
    from vllm import envs
    from vllm_ascend import ascend_config

    from oproj_patch import releases
    from oproj_patch.hosts import detect
    from oproj_patch.seams import vllm_ascend

    version = detect().versions["vllm-ascend"]
    theirs = ascend_config._ASCEND_CONFIG
    first, second = (releases.in_range(version, v, v) for v in ("0.9.1", "0.11.0"))
    enabled = SimpleNamespace(enabled=True)
    eagle = SimpleNamespace(method="eagle", num_speculative_tokens=2)
    drafter = SimpleNamespace(method="mtp", num_speculative_tokens=2)
    full = SimpleNamespace(name="FULL")
    graphs = (config.model_config, "enforce_eager", False)
    mode = (config.compilation_config, "cudagraph_mode", full)
    # What to set, and whether this release refuses it.
    cases: dict[str, tuple[list[tuple[Any, str, Any]], bool]] = {
        "nothing": ([], False),
        "xlite": ([(theirs, "xlite_graph_config", enabled)], True),
        "layer_sharding": ([(theirs, "layer_sharding", ["o_proj"])], True),
        "prefill": ([(config.parallel_config, "prefill_context_parallel_size", 2)], True),
        "decode": ([(config.parallel_config, "decode_context_parallel_size", 2)], True),
        "eagle": ([(config, "speculative_config", eagle)], second),
        "first engine": ([(envs, "VLLM_USE_V1", False)], first),
        "own graphs": ([graphs], first),
        "full graphs": ([graphs, mode], first or second),
        "full graphs, drafter": ([graphs, mode, (config, "speculative_config", drafter)], True),
        "shared experts": (
            [
                graphs,
                (theirs, "torchair_graph_config", enabled),
                (theirs, "enable_shared_expert_dp", True),
            ],
            second,
        ),
    }
    told = {}
    for name, (changes, expected) in cases.items():
        with contextlib.ExitStack() as stack:
            for target, attribute, value in changes:
                stack.enter_context(changed(target, attribute, value))
            sentence = refused(lambda: vllm_ascend.refuse_configuration(config, version))
        told[name] = sentence if expected else f"not expected: {sentence}" * bool(sentence)
    for variable in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_ASCEND_ENABLE_DBO"):
        os.environ[variable] = "1"
        told[variable] = refused(lambda: vllm_ascend.refuse_configuration(config, version))
        del os.environ[variable]
    return told


@contextlib.contextmanager
def changed(target: Any, name: str, value: Any) -> Iterator[None]:
    """`target.name` is `value`, past any checks the object makes on assignment."""
    absent = object()
    before = vars(target).get(name, absent)
    vars(target)[name] = value
    try:
        yield
    finally:
        if before is absent:
            del vars(target)[name]
        else:
            vars(target)[name] = before


def hosts_refused() -> dict[str, str]:
    """A host that is not as tested, when vLLM creates its groups; nothing may be patched then."""
    import vllm
    import wrapt
    from vllm_ascend.attention import mla_v1

    from oproj_patch import api
    from oproj_patch.hosts import detect
    from oproj_patch.settings import Settings

    seams = detect().seams(Settings(size=4))
    told = {}
    with changed(vllm, "__version__", "0.12.0"):
        told["pair"] = refused(api._install)
    implementation = mla_v1.AscendMLAImpl
    del mla_v1.AscendMLAImpl
    told["symbol"] = refused(api._install)
    mla_v1.AscendMLAImpl = implementation
    hook = "vllm.distributed.parallel_state.init_model_parallel_group"
    patched = [
        seam.symbol
        for seam in seams
        if seam.symbol != hook
        and isinstance(
            wrapt.resolve_path(importlib.import_module(seam.module), seam.path)[2],
            wrapt.FunctionWrapper,
        )
    ]
    return {**told, "patched": " ".join(patched), "host": str(detect())}


def torchair(
    model: str, dp: int, compiled: list[int], prefills: list[list[int]], **engine: Any
) -> dict[str, Any]:
    """vllm-ascend's model for torchair's graphs, traced whole as there, by torch's own backends.

    compiled: rows of every rank by step; prefills: rows by step and rank of passes outside of
    the graph, 0 for an idle rank.
    """
    graph = {"torchair_graph_config": {"enabled": True, "graph_batch_sizes": [4]}}
    with worker(model, dp, additional_config=graph, enforce_eager=False, **engine) as config:
        with contextlib.suppress(ModuleNotFoundError):
            from vllm_ascend.torchair import utils

            # What the constructor of its model runner does.
            utils.register_torchair_model()
            utils.torchair_ops_patch()
            utils.torchair_quant_method_register()
        kernels()
        torchair_kernels()
        built = build(config, experts=False)
        result = attempt(lambda: torchair_steps(config, built, compiled, prefills))
        with contextlib.suppress(ModuleNotFoundError):
            from vllm_ascend.ascend_config import get_ascend_config
            from vllm_ascend.torchair.models import torchair_deepseek_v2 as module

            for place, scatters in enumerate((False, True), start=20):
                get_ascend_config().multistream_overlap_shared_expert = scatters
                for name in ("MLA", "SFA"):
                    cls = getattr(module, f"TorchairDeepseekV2{name}Attention")
                    where = place + 10 * (name == "SFA")
                    key = f"{name}{' scattering' * scatters}"
                    result[key] = attempt(functools.partial(one_attention, config, cls, where))
        return result


def torchair_kernels() -> None:
    """Single NPU kernels of torchair's attention, in plain torch: positions have no effect."""
    import torch_npu

    def npu_kv_rmsnorm_rope_cache(
        kv: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        nope, rope = kv.split([weight.shape[0], kv.shape[-1] - weight.shape[0]], -1)
        return rope, nope, rope, nope

    with contextlib.suppress(ModuleNotFoundError):
        rotary = importlib.import_module("vllm_ascend.torchair.ops.torchair_rotary_embedding")
        # Makes its tables on the NPU.
        setattr(rotary, "__set_cos_sin_cache", lambda *_, **__: None)
    torch_npu.npu_kv_rmsnorm_rope_cache = npu_kv_rmsnorm_rope_cache
    torch_npu.npu_interleave_rope = lambda x, *_: x


class TorchairAttention:
    """Stands in for the attention kernels alone, between real projections."""

    def __init__(self, impl: Any) -> None:
        self.impl = impl
        impl._forward_decode = self.decode
        impl._forward_prefill = self.prefill

    def decode(self, q_nope: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        output: torch.Tensor = self.impl._v_up_proj_and_o_proj(q_nope)
        return output

    def prefill(self, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query[..., : self.impl.v_head_dim].reshape(query.shape[0], -1)


def torchair_steps(
    config: Any, built: Any, compiled: list[int], prefills: list[list[int]]
) -> dict[str, Any]:
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context
    from vllm_ascend.attention.attention_v1 import AscendAttentionState

    import oproj_patch

    impls = [module.impl for module in built.modules() if hasattr(module, "impl")]
    for impl in impls:
        impl.process_weights_after_loading(torch.float32)
        TorchairAttention(impl)
    layers = [layer.self_attn.o_proj for layer in built.model.layers]
    full = dict(checkpoint(config.model_config.hf_config))
    weights = [
        full[f"model.layers.{index}.self_attn.o_proj.weight"] for index in range(len(layers))
    ]
    caches = [(torch.empty(2, 2, 2, 2),) * 2 for _ in layers]
    mine = config.parallel_config.data_parallel_rank

    def run(call: Any, rows: int, prefill: bool = False, idle: bool = False) -> torch.Tensor:
        told = metadata(rows)
        told.attn_state = AscendAttentionState.DecodeOnly
        told.decode.cos = told.decode.sin = torch.zeros(rows)
        if prefill:
            told.num_prefills, told.num_decodes, told.num_decode_tokens = rows, 0, 0
            told.attn_state = AscendAttentionState.PrefillNoCache
            told.prefill = SimpleNamespace(cos=torch.zeros(rows), sin=torch.zeros(rows))
        tokens = torch.arange(rows) % 8
        with (
            torch.inference_mode(),
            set_ascend_forward_context(
                None if idle else told,
                config,
                num_tokens=rows,
                num_tokens_across_dp=torch.full((2,), rows, dtype=torch.int32),
                with_prefill=prefill,
            ),
        ):
            output: torch.Tensor = call(
                input_ids=tokens,
                positions=tokens,
                intermediate_tensors=None,
                inputs_embeds=None,
                kv_caches=caches,
                attn_metadata=None if idle else told,
            )
        return output

    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    outputs: dict[str, list[torch.Tensor]] = {}
    for name, backend in (("eager", counting), ("aot_eager", "aot_eager")):
        torch._dynamo.reset()
        call = torch.compile(built, dynamic=True, fullgraph=True, backend=backend)
        outputs[name] = [run(call, rows) for rows in compiled]
    before = oproj_patch.status().exchanges
    outside = [run(built, step[mine] or 1, True, idle=not step[mine]) for step in prefills]
    result: dict[str, Any] = {
        "attention": type(impls[0]).__name__,
        "classes": [type(layer).__name__ for layer in layers],
        "shapes": [list(layer.weight.shape) for layer in layers],
        "exact": [
            torch.equal(layer.weight, weight.chunk(2, 1)[mine])
            for layer, weight in zip(layers, weights, strict=True)
        ],
        "graphs": len(graphs),
        "collectives": sum("all_to_all" in node for node in graphs[0]),
        "exchanges": oproj_patch.status().exchanges - before,
    }
    for layer, weight in zip(layers, weights, strict=True):
        unsharded(layer, weight)
    expected = [run(built, rows) for rows in compiled]
    prefilled = [run(built, step[mine] or 1, True, idle=not step[mine]) for step in prefills]
    for name, pairs in (
        ("eager", zip(outputs["eager"], expected, strict=True)),
        ("aot_eager", zip(outputs["aot_eager"], expected, strict=True)),
        ("outside", zip(outside, prefilled, strict=True)),
    ):
        result[name] = [
            float((output - plain).abs().max() / plain.abs().max()) for output, plain in pairs
        ]
    return result
