"""In a rank: what one vLLM release does with the sharded layer, part by part, in one process."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from . import forks
from .layer import O_PROJ, build, finish, forward_context, load, place
from .world import model_groups, whole, world

Result = dict[str, Any]
SIZE = 2
HEADS, HIDDEN, COLUMNS = 4, 64, 512  # columns = heads * v_head_dim
UNEQUAL = [[3, 1], [5, 5], [1, 7], [2, 6]]
IDLE = [[4, 0], [0, 3], [0, 0], [2, 2]]
# What attention and quantization methods ask of a ModelConfig; a real one needs a whole model.
MODEL = SimpleNamespace(
    is_moe=True,
    model="a mixture-of-experts model",
    dtype=torch.float32,
    quantization=None,
    is_mm_prefix_lm=False,
    use_mla=True,
    hf_config=SimpleNamespace(),
    hf_text_config=SimpleNamespace(),
)
MODULES = (
    "vllm.distributed.parallel_state",
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.parameter",
    "vllm.model_executor.models.deepseek_v2",
    "vllm.forward_context",
    "vllm.plugins",
)
QUANTIZATION = "vllm.model_executor.layers.quantization"
# The bulk of what the parts import.
IMPORTED = (
    *MODULES,
    "torch._dynamo",
    "vllm.model_executor.model_loader.base_loader",
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors",
    f"{QUANTIZATION}.fp8",
)


def on_all_ranks() -> list[Result]:
    """`all_parts` of every rank, each a fork of this process: what is imported, is so once."""
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # not in every release
            importlib.import_module(name)

    def rank(number: int) -> Result:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(SIZE)}
        return all_parts()

    return forks.run([functools.partial(rank, number) for number in range(SIZE)], seconds=120)


def all_parts() -> Result:
    """Every part's result, or the traceback it ended with; a part does not stop the next."""
    from vllm.config import set_current_vllm_config

    import oproj_patch
    from oproj_patch.seams import registry, vllm
    from oproj_patch.settings import Settings

    told: Result = {"release": release()}
    # Only the hook is there yet: the original is what it wraps.
    declared = vllm.seams(Settings(size=SIZE), {})
    originals = {}
    for seam in declared:
        found = registry.resolve(seam, "")
        assert found is not None
        originals[seam.symbol] = (found[0], found[1], _unhooked(found[2]))
    process_groups = torch.distributed.distributed_c10d._world.pg_map
    config = configuration()
    with set_current_vllm_config(config), world():
        before = len(process_groups)
        with model_groups(SIZE, config=config):
            config.model_config = MODEL
            # The drafter last: some releases shard nothing that is built after a model.
            for part in (construct, loads, eager, idle, compiled, quantized, row_counts, drafter):
                told[part.__name__] = _told(part, config)
            status = oproj_patch.status()
            wrapped = _replaced(originals)
        told["seams"] = {
            "installed": list(status.seams),
            "wrapped": wrapped,
            "declared": [seam.symbol for seam in declared],
            "ranks": [list(status.otp_ranks), list(oproj_patch.status().otp_ranks)],
            "groups": [before, len(process_groups)],
        }
        oproj_patch.disable()
        told["seams"]["left"] = _replaced(originals)
    return told


def configuration() -> Any:
    """vLLM's configuration without a model, which 0.9.1 and 0.9.2 refuse on a CPU."""
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.platforms import current_platform

    try:
        config = VllmConfig()
    except AttributeError:
        with mock.patch.object(type(current_platform), "check_and_update_config"):
            config = VllmConfig()
    config.parallel_config = ParallelConfig()
    config.additional_config = {}
    return config


def _replaced(originals: dict[str, tuple[Any, str, Any]]) -> list[str]:
    """Symbols which are not the original object now."""
    return [
        symbol
        for symbol, (parent, attribute, original) in originals.items()
        if inspect.getattr_static(parent, attribute) is not original
    ]


def _unhooked(original: Any) -> Any:
    return inspect.unwrap(original) if hasattr(original, "_self_wrapper") else original


def _told(part: Callable[[Any], Result], config: Any) -> Result:
    try:
        return part(config)
    except Exception:
        return {"error": traceback.format_exc()[-3000:]}


def release() -> Result:
    """Which release it is, and where its modules come from."""
    files = {name: importlib.import_module(name).__file__ for name in MODULES}
    import vllm
    import wrapt
    from vllm.platforms import current_platform

    return {
        "version": vllm.__version__,
        "wrapt": wrapt.__version__,
        "torch": torch.__file__,
        "files": files,
        "device": current_platform.device_type,
    }


def construct(config: Any) -> Result:
    """Both attention modules of DeepSeek, with an o_proj that is sharded, loads and runs."""
    return {
        name: _attention(name, config) for name in ("DeepseekV2MLAAttention", "DeepseekV2Attention")
    }


def _attention(name: str, config: Any) -> Result:
    from vllm.model_executor.models import deepseek_v2

    import oproj_patch

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    hf_config = SimpleNamespace(
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope),
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=256,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
    )
    prefix = f"{name}.layers.0.self_attn"
    given = {
        "vllm_config": config,
        "config": hf_config,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": COLUMNS // HEADS,
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "cache_config": config.cache_config,
        "quant_config": None,
        "prefix": prefix,
    }
    cls = getattr(deepseek_v2, name)
    known = inspect.signature(cls.__init__).parameters
    with _without_kernels(deepseek_v2):
        module = cls(**{key: value for key, value in given.items() if key in known})
    layer = module.o_proj
    weight = whole(HIDDEN, COLUMNS, torch.float32)
    load(layer, weight, None)
    cut = place(layer.weight.data, weight)
    finish(layer)
    return {
        "class": type(module).__qualname__,
        "sharded": hasattr(layer, "oproj"),
        "named": layer.oproj.name == f"{prefix}.o_proj",
        "counted": oproj_patch.status().layers > 0,
        "cut": cut,
        "error": _error(layer, layer, weight, [3, 1], config),
    }


@contextlib.contextmanager
def _without_kernels(deepseek_v2: Any) -> Iterator[None]:
    """Leave out what computes attention, which few releases have for a CPU; all else is real."""

    class Nothing(torch.nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

    latent = "MultiHeadLatentAttention"
    names = {"Attention", "MLAAttention", latent, f"{latent}Wrapper"} & vars(deepseek_v2).keys()
    kept = {name: vars(deepseek_v2)[name] for name in names}
    vars(deepseek_v2).update(dict.fromkeys(kept, Nothing))
    try:
        yield
    finally:
        vars(deepseek_v2).update(kept)


def loads(config: Any) -> Result:
    """Both weight loaders cut the shard of this rank out of the whole weight, bit for bit."""
    from vllm.model_executor.parameter import ModelWeightParameter

    weight = whole(HIDDEN, COLUMNS, torch.bfloat16)
    found: Result = {}
    layer = build("own.self_attn.o_proj", HIDDEN, COLUMNS, bias=False, params_dtype=weight.dtype)
    load(layer, weight, None)
    found["of the parameter"] = place(layer.weight.data, weight)
    layer = build("first.self_attn.o_proj", HIDDEN, COLUMNS, bias=False, params_dtype=weight.dtype)
    layer.weight_loader(layer.weight, weight)
    found["weight_loader"] = place(layer.weight.data, weight)
    layer = build("second.self_attn.o_proj", HIDDEN, COLUMNS, bias=True, params_dtype=weight.dtype)
    if not isinstance(layer.weight, ModelWeightParameter):
        layer.weight = ModelWeightParameter(
            data=torch.empty_like(layer.weight),
            input_dim=1,
            output_dim=0,
            weight_loader=layer.weight_loader_v2,
        )
        if hasattr(layer, "update_param_tp_status"):
            layer.update_param_tp_status()
    layer.weight_loader_v2(layer.weight, weight)
    found["weight_loader_v2"] = place(layer.weight.data, weight)
    layer.bias.weight_loader(layer.bias, weight[:, 0])
    found["bias whole"] = torch.equal(layer.bias.data, weight[:, 0])
    return found


def eager(config: Any) -> Result:
    return _forwards("eager", UNEQUAL, config, lambda layer: layer)


def idle(config: Any) -> Result:
    """Steps in which a rank has no row."""
    return _forwards("idle", IDLE, config, lambda layer: layer)


def compiled(config: Any) -> Result:
    """One graph for all row counts of 2 or more."""
    # The same torch for all releases: what differs is what is traced, not its code generation.
    compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    told = _forwards("compiled", [[3, 2], [5, 5], [2, 7], [4, 3]], config, compile_)
    told["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return told


def _forwards(name: str, rows: list[list[int]], config: Any, wrap: Callable[..., Any]) -> Result:
    import oproj_patch

    layer = build(f"{name}.{O_PROJ}", HIDDEN, COLUMNS, bias=True)
    weight, bias = whole(HIDDEN, COLUMNS, torch.float32), whole(1, HIDDEN, torch.float32, seed=1)[0]
    load(layer, weight, bias)
    finish(layer)
    forward = wrap(layer)
    before = oproj_patch.status().exchanges
    errors = [_error(forward, layer, weight, counts, config, bias) for counts in rows]
    return {"errors": errors, "exchanges": oproj_patch.status().exchanges - before}


def _error(
    forward: Any,
    layer: Any,
    weight: torch.Tensor,
    counts: list[int],
    config: Any,
    bias: torch.Tensor | None = None,
) -> float:
    """Largest difference from the whole weight's output, in float64."""
    rank = config.parallel_config.data_parallel_rank
    x = whole(counts[rank], COLUMNS, torch.float32, seed=50 + rank)
    # A rank with no row at all has no data-parallel metadata in every release.
    with torch.inference_mode(), forward_context(config, counts, announced=min(counts) > 0):
        output = forward(x)[0]
    expected = x.double() @ weight.double().t()
    if bias is not None:
        expected = expected + bias.double()
    assert output.shape == expected.shape, (output.shape, expected.shape)
    return float((output.double() - expected).abs().max()) if x.numel() else 0.0


def quantized(config: Any) -> Result:
    """Per quantization: every parameter's shape, and whether it holds its part of the whole."""
    return {name: _told(functools.partial(_quantized, name), config) for name in _QUANTIZED}


def _fp8_block() -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
    )


def _w8a8() -> Any:
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    def numbers(strategy: str, dynamic: bool) -> Result:
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy,
                "dynamic": dynamic}  # fmt: skip

    return compressed_tensors.CompressedTensorsConfig.from_config(
        {
            "format": "int-quantized",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": numbers("channel", False),
                    "input_activations": numbers("token", True),
                }
            },
        }
    )


def _gptq() -> Any:
    settings: Result = {
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "lm_head": False,
        "sym": True,
    }
    settings["modules_in_block_to_quantize"] = ["self_attn.o_proj"]
    return _from_config(("gptq.GPTQConfig", "auto_gptq.AutoGPTQConfig"), settings)


def _awq() -> Any:
    settings = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "lm_head": False}
    return _from_config(("awq.AWQConfig", "auto_awq.AutoAWQConfig"), settings)


def _from_config(names: tuple[str, ...], settings: Result) -> Any:
    """The first of `names` that the release has, made from a checkpoint's settings."""
    for name in names:
        module, _, cls = name.partition(".")
        try:
            found = importlib.import_module(f"{QUANTIZATION}.{module}")
        except ModuleNotFoundError:
            continue
        return getattr(found, cls).from_config(settings)
    raise LookupError(f"no {' or '.join(names)}")


_QUANTIZED: dict[str, Callable[[], Any]] = {
    "fp8 block": _fp8_block,
    "W8A8": _w8a8,
    "GPTQ": _gptq,
    "AWQ": _awq,
}


def _quantized(name: str, config: Any) -> Result:
    rank = config.parallel_config.data_parallel_rank
    prefix = f"{name.replace(' ', '_')}.{O_PROJ}"
    quant_config = _QUANTIZED[name]()
    options = {"quant_config": quant_config, "params_dtype": torch.bfloat16}
    try:
        layer = build(prefix, 256, COLUMNS, bias=False, **options)
    except ValueError as error:
        # Releases since 0.19 choose the kernel here, and have none for most CPUs; 0.20's table
        # has no row for CPUs at all.
        if not any(told in str(error) for told in ("Failed to find a kernel", "PlatformEnum.CPU")):
            raise
        return {}
    found: Result = {}
    generator = torch.Generator().manual_seed(7)
    for key, param in layer.named_parameters():
        shape = list(param.shape)
        cut = getattr(param, "input_dim", None)
        if cut is not None:
            shape[cut] *= SIZE
        data = torch.randint(0, 100, shape, generator=generator).to(param.dtype)
        param.weight_loader(param, data)
        if cut is not None:
            data = data.narrow(cut, rank * param.shape[cut], param.shape[cut])
        same = torch.equal(param.data.view(torch.uint8), data.contiguous().view(torch.uint8))
        found[key] = [list(param.shape), same]
    return found


def row_counts(config: Any) -> Result:
    """What the release's own forward context says, given counts and by its own all-reduce."""
    from oproj_patch import otp_group
    from oproj_patch.seams.vllm import Forward

    group = otp_group.require("the test")
    rank = config.parallel_config.data_parallel_rank
    told = []
    for counts in ([3, 5], [6, 6], [1, 2]):
        with forward_context(config, counts, announced=True):
            told.append([counts, Forward().announced(group)])
    from vllm.forward_context import set_forward_context

    with set_forward_context(None, config, num_tokens=4 + 3 * rank):
        own = Forward().announced(group)
    return {"told": told, "own": [[4, 7], own]}


def drafter(config: Any) -> Result:
    """A model, then its drafter: who is sharded, and a step in which rank 1 does not draft.

    Both are built by vLLM's own loader. Where the drafter is sharded, rank 1 runs it all the same.
    """
    from vllm.model_executor.model_loader import base_loader

    import oproj_patch

    class Model(torch.nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.o_proj = build(f"{prefix}.self_attn.o_proj", HIDDEN, COLUMNS, bias=False)
            caches = vllm_config.compilation_config.static_forward_context
            caches[f"{prefix}.self_attn.attn"] = SimpleNamespace(kv_cache=[])

    weight = whole(HIDDEN, COLUMNS, torch.float32)
    found: Result = {}
    for name in ("model", "draft"):
        prefix = f"{name}.layers.0"
        model = base_loader.initialize_model(config, prefix=prefix, model_class=Model)
        layer = model.o_proj
        found[name] = [hasattr(layer, "oproj"), list(layer.weight.shape)]
        load(layer, weight, None)
        finish(layer)
    before = oproj_patch.status().exchanges
    drafts = config.parallel_config.data_parallel_rank == 0 or found["draft"][0]
    found["difference"] = _error(layer, layer, weight, [3, 1], config) if drafts else 0.0
    found["exchanges"] = oproj_patch.status().exchanges - before
    return found
