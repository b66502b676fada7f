"""In a rank: the real vllm-ascend on a CPU, over gloo.

Stood in for here, in one place: what asks for a device (`torch.npu.current_device`, the cast to
the NPU's weight layout) and the dispatch key of vllm-ascend's own operators, CPU instead of
PrivateUse1. Single `torch_npu.npu_*` kernels are in `ascend_kernels`, for tests that need them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.ranks.launch import SIZE
from tests.ranks.layers import whole

from .ascend_kernels import kernels_stood_in
from .wheels import Host, environment

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


def option(release: str) -> dict[str, Any]:
    """Return vllm-ascend's own option, where the release reads it (0.9.1 has none)."""
    size = {"oproj_tensor_parallel_size": 2}
    return size if release in ("0.9.1", "0.11.0") else {"finegrained_tp_config": size}


def variables(host: Host, size: int | str) -> dict[str, str]:
    """Return the environment of a rank on `host` with the toggle `size`."""
    env = {**environment(host, {}), SIZE: str(size)}
    if host.version == "0.9.1":
        env["VLLM_USE_V1"] = "1"  # not the default there on an NPU
    return env


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
    first_of(["vllm_ascend.worker.worker_v1", "vllm_ascend.worker.worker"])


def first_of(names: Iterable[str]) -> Any:
    """Import the first of these modules that the release has."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError(f"none of {names}")


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


def check_steps(
    config: Any, built: Any, attention: str, plan: list[list[int]], idle: bool = True
) -> None:
    """Run the real model under `plan[step][rank]` rows; 0 is an idle rank, -n a profile run of n.

    Each output is that of the same model with whole o_proj weights, of all layers but attention's
    kernels; without `idle` only where the rank has rows.
    """
    import oproj_patch

    full = dict(checkpoint(config.model_config.hf_config))
    impls = []
    for module in built.modules():
        if hasattr(module, "impl"):
            kernels_stood_in(module)
            impls.append(module.impl)
    assert type(impls[0]).__name__ == attention
    parallel = config.parallel_config
    mine = parallel.data_parallel_rank
    layers = [layer.self_attn.o_proj for layer in built.model.layers]
    weights = [
        full[f"model.layers.{index}.self_attn.o_proj.weight"] for index in range(len(layers))
    ]

    def run(counts: list[int]) -> Any:
        count = counts[mine]
        return forward(built, config, abs(count) or 1, idle=count <= 0, profile=count < 0)

    before = oproj_patch.status().exchanges
    outputs = [run(counts) for counts in plan]
    assert oproj_patch.status().exchanges - before == len(plan) * 2
    ways = parallel.data_parallel_size * parallel.tensor_parallel_size
    assert [list(layer.weight.shape) for layer in layers] == [[64, 256 // ways]] * 2
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, own_part(weight, config))
        unsharded(layer, weight)
    for counts, output in zip(plan, outputs, strict=True):
        expected = run(counts)
        if idle or counts[mine] > 0:
            assert float((output - expected).abs().max()) <= 5e-6 * float(expected.abs().max())


def own_part(full: torch.Tensor, config: Any) -> torch.Tensor:
    """Of a full weight, the columns of this rank's heads, and of those this rank's part."""
    parallel = config.parallel_config
    tp, dp = parallel.tensor_parallel_size, parallel.data_parallel_size
    heads = full.chunk(tp, 1)[int(os.environ["RANK"]) % tp]
    return heads.chunk(dp, 1)[parallel.data_parallel_rank]


def unsharded(layer: Any, weight: torch.Tensor) -> None:
    """Let `layer` run with the whole weight of its heads and without any exchange of ours."""
    from vllm.distributed import get_tp_group

    from oproj_patch.sharding.layer import ShardedMixin

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


def check_attention(config: Any, attention: Any, place: int, name: str, scatters: bool) -> None:
    """Check the o_proj, of class `name`, of an attention made as layer `place` of a model.

    scatters: it is refused with two tensor-parallel ranks, where it would scatter its result.
    """
    from oproj_patch.hosts import vllm_ascend
    from oproj_patch.sharding.layer import ShardedMixin

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
    assert (type(layer).__name__, isinstance(layer, ShardedMixin)) == (name, True)
    assert layer.weight.shape == (64, 128)
    weight = whole(hf.hidden_size, hf.num_attention_heads * hf.v_head_dim, torch.float32, seed=1)
    layer.weight.weight_loader(layer.weight, weight)
    mine = config.parallel_config.data_parallel_rank
    x = whole(3 + mine, weight.shape[1], torch.float32, seed=2 + mine)
    with torch.inference_mode():
        output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    assert float((output - x @ weight.t()).abs().max()) <= 5e-6
    with changed(layer.oproj.group, "tp_size", 2):
        told = refused(lambda: vllm_ascend.VllmAscend({}).check_layer(layer))
    if scatters:
        assert told.startswith("OPROJ015")
        assert f"is a {name}, which scatters its result over 2 tensor-parallel" in told
    else:
        assert told == ""


def refused(body: Callable[[], Any]) -> str:
    """Return the sentence with which the package refuses, or ""."""
    from oproj_patch.errors import OprojError

    try:
        body()
    except OprojError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def changed(target: Any, name: str, value: Any) -> Iterator[None]:
    """Let `target.name` be `value`, past any checks the object makes on assignment."""
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
