"""What vLLM's CPU backend lacks to run DeepSeek V4. Test support only.

Loaded in worker processes as `worker_extension_cls="cpu_v4.V4WorkerProbe"`. Beside what `cpu_moe`
adds, it stands in for two Triton launches whose results a CPU does not read, and gives
`build_tile_scheduler` the two names that its CPU override lacks (0.32.0, upstream's defect). With
device graphs, emulated, a step may have padding rows, which the CPU's attention leaves out here.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from vllm import _custom_ops, forward_context
from vllm.models.deepseek_v4.cpu import cpu_mla, cpu_sparse
from vllm.v1.attention.backends.mla import sparse_swa
from vllm.v1.attention.ops import metadata

from tests.graphs import emulator

_base: Any = importlib.import_module("cpu_moe").MoeWorkerProbe


class V4WorkerProbe(_base):  # type: ignore[misc]
    """The probe, in a worker that can run DeepSeek V4; it reports besides what was traced."""

    def oproj_counts(self) -> dict[str, Any]:
        graphs = emulator.Graph
        return {
            "traced": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "captures": graphs.captures,
            "replays": graphs.replays,
        }


def _no_launch(*_: Any, **__: Any) -> None:
    """Leave the indices unset."""


def _requests(starts: torch.Tensor, out: torch.Tensor, mapped: int, tokens: int) -> torch.Tensor:
    """Write the request of each of the first `mapped` tokens, and 0 for the others."""
    request = torch.searchsorted(starts, torch.arange(tokens), right=True, out_int32=True) - 1
    out[:tokens] = request.clamp(max=starts.shape[0] - 2)
    out[mapped:tokens] = 0
    return out[:tokens]


def _no_plan(self: Any, num_decode_tokens: int) -> dict[str, None]:
    kinds = ("SWAONLY", "C4A", "C128A", "C1A", "C2A")
    return {getattr(sparse_swa, f"_LAYER_TYPE_{kind}"): None for kind in kinds}


def _attend(
    self: Any, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, output: torch.Tensor
) -> None:
    """Leave out the padding rows of a step with graphs, of which the metadata have none."""
    rows, told = q.shape[0], forward_context.get_forward_context().attn_metadata
    if told is not None:
        rows = told[self.swa_cache_layer.prefix].token_to_req_indices.shape[0]
        output[rows:].zero_()
    _attend_all(self, q[:rows], kv[:rows], positions[:rows], output[:rows])


def _insert(
    q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor,
    slots: torch.Tensor, *given: Any,
) -> torch.Tensor:  # fmt: skip
    """Give padding rows the slot that is none."""
    padding = kv.shape[0] - slots.shape[0]
    slots = torch.nn.functional.pad(slots, (0, padding), value=-1) if padding else slots
    output: torch.Tensor = _insert_all(q, kv, positions, cache, slots, *given)
    return output


_attend_all = cpu_sparse.DeepseekV4CPUAttention.forward_mqa
_insert_all = _custom_ops.fused_qnorm_rope_kv_insert_cpu
cpu_sparse.DeepseekV4CPUAttention.forward_mqa = _attend
_custom_ops.fused_qnorm_rope_kv_insert_cpu = _insert
metadata.compute_token_to_req_indices = _requests
sparse_swa._COMPUTE_SWA_INDICES_AND_LENS_KERNEL = _no_launch
sparse_swa._COMPUTE_PREFILL_METADATA_KERNEL = _no_launch
cpu_mla.DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = _no_plan
sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler = _no_plan
# Counts of rows are on the CPU on a device as well.
forward_context._compute_sp_num_tokens = emulator.on_host(forward_context._compute_sp_num_tokens)
importlib.import_module("v4_kernels").stand_in()
