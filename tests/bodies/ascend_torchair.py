"""In a rank on vllm-ascend: the graphs of its torchair mode."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import torch

from .ascend import attempt, build, checkpoint, metadata, unsharded, worker
from .ascend_kernels import TorchairAttention, kernels, torchair_kernels
from .ascend_layers import one_attention


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
