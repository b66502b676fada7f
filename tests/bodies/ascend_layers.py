"""In a rank on vllm-ascend: single layers, made by its own classes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from .ascend import forward_context, own_part
from .ascend_refusals import changed, refused
from .world import whole


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
