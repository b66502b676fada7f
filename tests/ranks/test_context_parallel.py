"""Context parallelism beside a sharded o_proj, by vLLM's own parts.

Decode: vLLM's MLA on TP 2 x DP 2 x DCP 2. The tokens of a request are shared out over the caches of
two tensor-parallel ranks. Triton's interpreter runs vLLM's kernels of the attention and of the
combination of its parts. Prefill: vLLM's manager cuts the batches of DP 2 x PCP 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ranks import launch
from tests.ranks.layers import (
    finish,
    forward_context,
    join_world,
    made,
    model_groups,
    reference,
    whole,
)
from tests.ranks.models import CONFIGS, engine_config, write

PREFIX = "model.layers.0.self_attn"
BLOCK = 16
INTERPRETED = {"TRITON_INTERPRET": "1"}
CONFIG = {**CONFIGS["deepseek_v3"], "q_lora_rank": None}
# pass -> data-parallel rank -> (tokens in the cache, new tokens) of each request; none: idle
PASSES: list[list[list[tuple[int, int]]]] = [
    [[(0, 5), (0, 18)], [(0, 3)]],
    [[(5, 1), (18, 1)], [(3, 1)]],
    [[(6, 1), (19, 1)], []],
    [[(7, 1)], [(4, 1)]],
]


@pytest.fixture(scope="module")
def server() -> Iterator[launch.Server]:
    modules = ("tests.ranks.interpreted", *launch.IMPORTED)
    with launch.Server(INTERPRETED, modules) as started:
        yield started


@pytest.mark.long
def test_decode_context_parallel(server: launch.Server, tmp_path: Path) -> None:
    path = write(CONFIG, tmp_path)
    told = launch.run(4, attended, path, env=INTERPRETED, server=server, seconds=240)
    for rank, (plain, sharded) in enumerate(told):
        assert (plain["layers"], sharded["layers"]) == (0, 1)
        dp_rank, tp_rank = divmod(rank, 2)
        # Of 8 + 20 or of 5 tokens a rank keeps every second one in its cache.
        assert plain["cached"] == [28, 5][dp_rank]
        assert sharded["cached"] == [[14, 14], [3, 2]][dp_rank][tp_rank]
        rows = [max(1, sum(new for _, new in entry[dp_rank])) for entry in PASSES]
        assert sharded["inputs"] == plain["inputs"] == [(count, 2 * 128) for count in rows]
        assert sharded["exchanges"] == len(PASSES)
        scale = max(float(output.abs().max()) for output in plain["outputs"] if output.numel())
        for one, other in zip(plain["outputs"], sharded["outputs"], strict=True):
            assert one.shape == other.shape
            assert float((one - other).abs().max()) <= 5e-6 * scale


def attended(path: str) -> list[dict[str, Any]]:
    """In a rank: run the passes without context parallelism and shim, then with both."""
    join_world()
    return [_passes(path, dcp=1, size=0), _passes(path, dcp=2, size=2)]


def _passes(path: str, dcp: int, size: int) -> dict[str, Any]:
    import oproj_patch

    oproj_patch.enable(size)
    config = engine_config(path)
    config.cache_config.block_size = BLOCK
    try:
        with model_groups(2, 2, config=config, dcp=dcp), torch.inference_mode():
            attention = _attention(config)
            layer = attention.mla_attn.mla_attn
            layer.kv_cache = torch.zeros(8, BLOCK, layer.head_size)
            inputs: list[Any] = []
            attention.o_proj.register_forward_pre_hook(
                lambda _, given: inputs.append(tuple(given[0].shape))
            )
            outputs = [_pass(config, attention, number) for number in range(len(PASSES))]
            status = oproj_patch.status()
            return {
                "outputs": outputs,
                "inputs": inputs,
                "cached": int(layer.kv_cache.abs().sum(-1).count_nonzero()),
                "layers": status.layers,
                "exchanges": status.exchanges,
            }
    finally:
        oproj_patch.disable()


def _attention(config: Any) -> Any:
    """Return DeepSeek's attention with weights, on vLLM's Triton kernels."""
    from vllm.model_executor.layers.attention import mla_attention
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLAAttention
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl

    class Implementation(TritonMLAImpl):
        do_kv_cache_update = CPUMLAImpl.do_kv_cache_update  # a CPU's own kernel

    class Backend(TritonMLABackend):
        @staticmethod
        def get_impl_cls() -> Any:
            return Implementation

    text = config.model_config.hf_text_config
    with mock.patch.object(mla_attention, "get_attn_backend", lambda *_, **__: Backend):
        attention = DeepseekV2MLAAttention(
            config, text, text.hidden_size, text.num_attention_heads, text.qk_nope_head_dim,
            text.qk_rope_head_dim, text.v_head_dim, text.q_lora_rank, text.kv_lora_rank,
            cache_config=config.cache_config, prefix=PREFIX,
        )  # fmt: skip
    for seed, (name, layer) in enumerate(attention.named_children()):
        if name.endswith("proj") or name == "kv_a_proj_with_mqa":
            layer.weight.weight_loader(
                layer.weight, whole(layer.output_size, layer.input_size, torch.float32, seed)
            )
            layer.quant_method.process_weights_after_loading(layer)
    attention.kv_a_layernorm.weight.data.fill_(1)
    attention.mla_attn.mla_attn.process_weights_after_loading(torch.float32)
    return attention


def _pass(config: Any, attention: Any, number: int) -> torch.Tensor:
    """Run one forward pass of this rank's requests, or the dummy batch of an idle rank."""
    from vllm.distributed import parallel_state
    from vllm.forward_context import set_forward_context
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
    from vllm.v1.worker.block_table import BlockTable

    layer = attention.mla_attn.mla_attn
    rows = [max(1, sum(new for _, new in requests)) for requests in PASSES[number]]
    dp_rank = config.parallel_config.data_parallel_rank
    requests = PASSES[number][dp_rank]
    metadata, slots = None, {}
    positions = torch.zeros(rows[dp_rank], dtype=torch.int64)
    if requests:
        before, new = (torch.tensor(numbers) for numbers in zip(*requests, strict=True))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
        positions = torch.cat([torch.arange(b, b + n) for b, n in requests])
        lengths = (before + new).int()
        table = BlockTable(BLOCK, 4, 4, 64, False, torch.device("cpu"), 1)
        for row in range(len(requests)):
            table.add_row([2 * row + 1, 2 * row + 2], row)
        table.commit_block_table(len(requests))
        table.compute_slot_mapping(len(requests), starts, positions)
        dcp = parallel_state.get_dcp_group()
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths,
            num_reqs=len(requests), num_actual_tokens=len(positions), max_query_len=int(new.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table.get_device_tensor(len(requests)),
            slot_mapping=table.slot_mapping.gpu[: len(positions)], seq_lens_cpu_upper_bound=lengths,
            dcp_local_seq_lens=get_dcp_local_seq_lens(lengths, dcp.world_size, dcp.rank_in_group),
        )  # fmt: skip
        spec, device = layer.get_kv_cache_spec(config), torch.device("cpu")
        builder = layer.attn_backend.get_builder_cls()(spec, [layer.layer_name], config, device)
        metadata = {layer.layer_name: builder.build(0, common)}
        slots = {layer.layer_name: common.slot_mapping}
    hidden = whole(rows[dp_rank], 64, torch.float32, seed=100 * number + dp_rank)
    counts = torch.tensor(rows, dtype=torch.int32)
    with set_forward_context(
        metadata, config, num_tokens=rows[dp_rank], num_tokens_across_dp=counts, slot_mapping=slots
    ):
        output: torch.Tensor = attention(positions, hidden, None)
    return output


# pass -> data-parallel rank -> (tokens computed before, new tokens, is prefilled) of each request
PREFILLS: list[list[list[tuple[int, int, bool]]]] = [
    [[(0, 21, True), (7, 1, False)], [(0, 6, True)]],
    [[(4, 1, False), (9, 1, False), (2, 1, False)], [(16, 30, True), (0, 3, True)]],
    [[(0, 1, True)], [(3, 1, False)]],
]


@pytest.mark.long
def test_prefill_context_parallel(server: launch.Server) -> None:
    """A rank runs, padded, as many rows as the most of its requests' chunks: as announced."""
    told = launch.run(4, prefilled, env=INTERPRETED, server=server, seconds=240)
    for number, requests in enumerate(PREFILLS):
        for dp_rank in (0, 1):
            pair = [told[2 * dp_rank + pcp_rank][number] for pcp_rank in (0, 1)]
            assert pair[0]["counts"] == pair[1]["counts"]
            assert {entry["rows"] for entry in pair} == {pair[0]["counts"][dp_rank]}
            # Each token is a row of one rank, so all are exact; some pairs have rows to spare.
            assert sum(entry["own"] for entry in pair) >= sum(
                new for _, new, _ in requests[dp_rank]
            )
    assert any(entry["own"] < entry["rows"] for rank in told for entry in rank)


def prefilled() -> list[dict[str, Any]]:
    """In a rank: run o_proj on the chunks of each batch; the restored rows are the unsharded."""
    from vllm.v1.worker.gpu.pcp_manager import PCPManager

    import oproj_patch

    join_world()
    oproj_patch.enable(2)
    try:
        with model_groups(2, pcp=2) as config, torch.inference_mode():
            layer, weight, _ = made(20, 48, prefix=f"{PREFIX}.o_proj")
            finish(layer)
            pcp_rank = int(os.environ["RANK"]) % 2
            manager = PCPManager(2, pcp_rank, torch.device("cpu"), True, 8, 64)
            told = [_chunks(config, layer, weight, manager, each) for each in PREFILLS]
            assert oproj_patch.status().exchanges == len(PREFILLS)
            return told
    finally:
        oproj_patch.disable()


def _chunks(config: Any, layer: Any, weight: Any, manager: Any, requests: Any) -> dict[str, Any]:
    """Run one batch of each data-parallel rank, cut by vLLM's manager."""
    import numpy as np
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    dp_rank, counts = config.parallel_config.data_parallel_rank, []
    for each in requests:
        _, new, prefills = (np.array(numbers) for numbers in zip(*each, strict=True))
        counts.append(manager.get_num_tokens_for_dispatch(new, prefills))
    before, new, prefills = (np.array(n) for n in zip(*requests[dp_rank], strict=True))
    total = int(new.sum())
    starts = np.concatenate([[0], new.cumsum()]).astype(np.int32)
    batch = replace(
        InputBatch.make_dummy(len(new), total, InputBuffers(8, 64, torch.device("cpu"))),
        num_scheduled_tokens=new, num_computed_tokens_np=before.astype(np.int32),
        query_start_loc=torch.from_numpy(starts), query_start_loc_np=starts,
        prefill_len_np=(before + new * prefills).astype(np.int32), is_prefilling_np=prefills,
        input_ids=torch.arange(total, dtype=torch.int32), has_prefill=bool(prefills.any()),
    )  # fmt: skip
    graph = BatchExecutionDescriptor(CUDAGraphMode.NONE, counts[dp_rank], None)
    local = manager.partition_batch(batch, graph)
    x = whole(total, 48, torch.float32, seed=7 + dp_rank)
    mine = x[local.input_ids.long()]
    with forward_context(config, counts, announced=True):
        output = layer(mine)[0]
    restored = manager.restore_hidden_states(output)
    assert restored.shape == (total, 20)
    assert float((restored.double() - reference(x, weight, None)).abs().max()) <= 5e-6
    return {"counts": counts, "rows": mine.shape[0], "own": local.num_tokens}
