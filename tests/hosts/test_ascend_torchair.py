"""The graphs of vllm-ascend's torchair mode, traced whole as there, by torch's own backends."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ranks import launch
from tests.ranks.layers import on_grid

from . import ascend
from .ascend import check_attention, checkpoint, metadata, unsharded
from .ascend_kernels import TorchairAttention, kernels, torchair_kernels
from .wheels import Host

COMPILED = [4, 8]
"""Rows of every rank by step."""
PREFILLS = [[3, 5], [4, 2]]
"""Rows by step and rank of passes outside of the graph."""


@pytest.mark.parametrize("grid", ["2x1", "1x2"])
@pytest.mark.parametrize("host", [Host("ascend", r) for r in ("0.9.1", "0.11.0")], ids=str)
def test_torchair_traces_whole(host: Host, grid: str, tmp_path: Path) -> None:
    """fullgraph=True, as torchair does it; its compiler is replaced by torch's own backends."""
    model = ascend.write_model(tmp_path)
    env = {**ascend.variables(host, 2), "OPROJ_GRID": grid}
    launch.run(2, torchair, model, host.version, env=env, fresh=True, seconds=400)


def torchair(model: str, release: str) -> None:
    """In a rank: trace the model; look at the attentions with layers of their own in 0.11.0."""
    own = release == "0.11.0"
    linear = "TorchairDeepseekV2RowParallelLinear" if own else "RowParallelLinear"
    graph = {"torchair_graph_config": {"enabled": True, "graph_batch_sizes": [4]}}
    with ascend.worker(model, 2, additional_config=graph, enforce_eager=False) as config:
        if own:
            from vllm_ascend.torchair import utils

            # What the constructor of its model runner does.
            utils.register_torchair_model()
            utils.torchair_ops_patch()
            utils.torchair_quant_method_register()
        kernels()
        torchair_kernels()
        _trace(config, ascend.build(config, experts=False), linear)
        _refuses_8_bits()
        if not own or os.environ["OPROJ_GRID"] != "2x1":
            return
        from vllm_ascend.ascend_config import get_ascend_config
        from vllm_ascend.torchair.models import torchair_deepseek_v2 as module

        for place, scatters in enumerate((False, True), start=20):
            get_ascend_config().multistream_overlap_shared_expert = scatters
            name = f"{linear}ReplaceAllreduce" if scatters else linear
            for kind, where in (("MLA", place), ("SFA", place + 10)):
                attention = getattr(module, f"TorchairDeepseekV2{kind}Attention")
                check_attention(config, attention, where, name, scatters)


def _refuses_8_bits() -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    name = "model.layers.50.self_attn.o_proj"
    with on_grid(2, 1, wire="int8"):
        told = ascend.refused(lambda: RowParallelLinear(256, 64, bias=False, prefix=name))
    assert (
        told.startswith(f"OPROJ015: OPROJ_WIRE is int8, which {name} (")
        and ("its graph compiler traces the step as plain collectives; accepted are auto and off:")
        in told
    )


def _trace(config: Any, built: Any, linear: str) -> None:
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

    def run(call: Any, rows: int, prefill: bool = False) -> torch.Tensor:
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
                told,
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
                attn_metadata=told,
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
        outputs[name] = [run(call, rows) for rows in COMPILED]
    before = oproj_patch.status().exchanges
    outside = [run(built, step[mine], True) for step in PREFILLS]
    assert oproj_patch.status().exchanges - before == len(PREFILLS) * len(layers) == 4
    assert [type(layer).__name__ for layer in layers] == [linear] * 2
    a, b = layers[0].oproj.grid
    assert f"{a}x{b}" == os.environ["OPROJ_GRID"]
    assert [list(layer.weight.shape) for layer in layers] == [[64 // b, 256 // a]] * 2
    # One graph for both sizes; in it the two collectives of each layer, and not our op.
    assert len(graphs) == 1 and sum("all_to_all" in node for node in graphs[0]) == 4
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, weight.chunk(a, 1)[mine // b].chunk(b)[mine % b])
        unsharded(layer, weight)
    expected = [run(built, rows) for rows in COMPILED]
    prefilled = [run(built, step[mine], True) for step in PREFILLS]
    for name, found, plain in (
        ("eager", outputs["eager"], expected),
        ("aot_eager", outputs["aot_eager"], expected),
        ("outside", outside, prefilled),
    ):
        for output, of_plain in zip(found, plain, strict=True):
            assert float((output - of_plain).abs().max() / of_plain.abs().max()) <= 5e-6, name
