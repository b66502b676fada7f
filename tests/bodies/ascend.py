"""In a rank: the real vllm-ascend on a CPU, over gloo.

Stood in for here, in one place: what asks for a device (`torch.npu.current_device`, the cast to
the NPU's weight layout) and the dispatch key of vllm-ascend's own operators, CPU instead of
PrivateUse1. Single `torch_npu.npu_*` kernels are stood in for where a test needs them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import traceback
from collections.abc import Callable, Iterator
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


def import_worker() -> None:
    """The first import of vllm-ascend in a worker process; the order matters from 0.23."""
    try:
        importlib.import_module("vllm_ascend.worker.worker_v1")
    except ModuleNotFoundError:
        importlib.import_module("vllm_ascend.worker.worker")


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
    import_worker()
    from vllm_ascend import utils
    from vllm_ascend.ascend_config import get_ascend_config, init_ascend_config

    utils.adapt_patch()
    if hasattr(utils, "register_ascend_customop"):
        given = (config,) if utils.register_ascend_customop.__code__.co_argcount else ()
        utils.register_ascend_customop(*given)
    init_ascend_config(config)
    if getattr(utils, "_ENABLE_NZ", 0) is None:
        utils.is_enable_nz(config)
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
                *((dp * tp, 1) if first == "expert_parallel_size" else (config.parallel_config,))
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
    torch_npu._npu_reshape_and_cache = lambda **_: None


def build(config: Any) -> Any:
    """The real model, with a synthetic checkpoint through its own `load_weights`."""
    from vllm.model_executor.model_loader import base_loader

    experts_stood_in(config)
    model = base_loader.initialize_model(config)
    model.load_weights(checkpoint(config.model_config.hf_config))
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)
    return model


def experts_stood_in(config: Any) -> None:
    """vLLM 0.11 insists on a layer with experts: its last one, with an ordinary MLP in it."""
    from vllm.model_executor.models import deepseek_v2

    if "No DeepseekV2MoE layer" not in inspect.getsource(deepseek_v2):
        return
    hf = config.model_config.hf_config
    hf.first_k_dense_replace = hf.num_hidden_layers - 1

    class Dense(deepseek_v2.DeepseekV2MLP):  # type: ignore[misc, name-defined]
        experts = None
        gate = SimpleNamespace(e_score_correction_bias=None)
        n_logical_experts = n_physical_experts = n_local_physical_experts = 8
        n_routed_experts, n_shared_experts, n_redundant_experts = 8, 1, 0

        def __init__(self, config: Any, prefix: str = "", **_: Any) -> None:
            super().__init__(
                config.hidden_size, config.intermediate_size, config.hidden_act, prefix=prefix
            )

    deepseek_v2.DeepseekV2MoE = Dense
    # vllm-ascend 0.11 has a copy of the model, which took the name at import.
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("vllm_ascend.models.deepseek_v3_2").DeepseekV2MoE = Dense


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


def model_steps(config: Any, built: Any, plan: list[list[int]]) -> dict[str, Any]:
    """The real model under `plan[step][rank]` rows; 0 is an idle rank, -n a profile run of n.

    Returns the errors against the same model with whole o_proj weights.
    """
    import oproj_patch

    hf = config.model_config.hf_config
    full = dict(checkpoint(hf))
    for module in built.modules():
        if hasattr(module, "impl"):
            Attention(module, module.impl)
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
        "class": type(layers[0]).__name__,
        "shapes": [list(layer.weight.shape) for layer in layers],
        "exact": [
            torch.equal(layer.weight, weight.chunk(len(plan[0]), 1)[mine])
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


def unsharded(layer: Any, weight: torch.Tensor) -> None:
    """Let `layer` run with the whole weight and without any exchange."""
    from oproj_patch.row_parallel import ShardedMixin

    cls = type(layer)
    host = next(
        base
        for base in cls.__mro__[1:]
        if not issubclass(base, ShardedMixin) and base is not ShardedMixin
    )

    def plain(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        output = torch.nn.functional.linear(x, weight)
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
    torch.Tensor.npu = lambda self, *_, **__: self


def quant_config(description: dict[str, Any]) -> Any:
    try:
        from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig as config
    except ImportError:
        from vllm_ascend.quantization.quant_config import AscendQuantConfig as config
    return config(description)


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
    size = config.parallel_config.data_parallel_size
    exact = {}
    for seed, (name, parameter) in enumerate(reference.named_parameters()):
        full = drawn(name, parameter, seed)
        own = dict(layer.named_parameters())[name]
        own.weight_loader(own, full)
        parameter.weight_loader(parameter, full)
        part = full if own.shape == parameter.shape else full.chunk(size, 1)[mine]
        exact[name] = torch.equal(own.data, part.view_as(own.data))
    shapes = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    for target in (layer, reference):
        target.quant_method.process_weights_after_loading(target)
    x = whole(3 + 2 * mine, columns, torch.bfloat16, seed=50 + mine) * 4
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
    }


def drawn(name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """A full tensor for a quantized layer's parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    if name == "weight":
        limit = 8
        return torch.randint(-limit, limit, parameter.shape, generator=generator).to(torch.int8)
    if name == "quant_bias":
        # Large: added once too often or not at all, it could not be missed.
        return torch.randint(2000, 4000, parameter.shape, generator=generator).to(torch.int32)
    if "offset" in name:
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    return (torch.rand(parameter.shape, generator=generator) * 0.05 + 0.01).to(parameter.dtype)


def host(
    model: str, dp: int, plan: list[list[int]], kinds: list[str], **engine: Any
) -> dict[str, Any]:
    """All that can be seen on one release with one start of the processes."""
    import oproj_patch

    with worker(model, dp, **engine) as config:
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
        return result


def attempt(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `body`, or its error: one failure must not hide the other results."""
    try:
        return body()
    except Exception as error:
        traceback.print_exc()
        return {"error_raised": f"{type(error).__name__}: {error}"}


def configuration(model: str, **engine: Any) -> None:
    """vLLM's configuration in the parent process, where no group exists yet."""
    stand_in()
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {"model": model, "skip_tokenizer_init": True, **engine}
    EngineArgs(**arguments).create_engine_config()
