"""What vLLM's CPU backend lacks to run DeepSeek V4. Test support only.

Loaded in worker processes as `worker_extension_cls="cpu_v4.V4WorkerProbe"`. Beside what `cpu_moe`
adds, it stands in for two Triton launches whose results a CPU does not read, and gives
`build_tile_scheduler` the two names that its CPU override lacks (0.32.0, upstream's defect).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from vllm.models.deepseek_v4.cpu import cpu_mla
from vllm.v1.attention.backends.mla import sparse_swa
from vllm.v1.attention.ops import metadata

_base: Any = importlib.import_module("cpu_moe").MoeWorkerProbe


class V4WorkerProbe(_base):  # type: ignore[misc]
    """The probe, in a worker that can run DeepSeek V4."""


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


metadata.compute_token_to_req_indices = _requests
sparse_swa._COMPUTE_SWA_INDICES_AND_LENS_KERNEL = _no_launch
sparse_swa._COMPUTE_PREFILL_METADATA_KERNEL = _no_launch
cpu_mla.DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = _no_plan
sparse_swa.DeepseekSparseSWAMetadataBuilder.build_tile_scheduler = _no_plan
importlib.import_module("v4_kernels").stand_in()
