"""What vLLM's CPU backend lacks to run experts with data parallelism. Test support only.

Loaded in worker processes as `worker_extension_cls="cpu_moe.MoeWorkerProbe"`. It adds

- `all_gatherv` and `reduce_scatterv` to the CPU communicator, over gloo, and
- the opaque MoE operators, which the CPU runner replaces by plain functions that Dynamo then
  traces into; the collectives above cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from demo.probe import WorkerProbe


class MoeWorkerProbe(WorkerProbe):
    """The probe, in a worker that can run experts with data parallelism."""


def _all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate the ranks' rows; `sizes` has the row count of every rank."""
    assert dim == 0
    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in input_]  # type: ignore[misc]
    sizes = sizes or [input_.shape[0]] * self.world_size
    longest = max(sizes)
    padded = input_.new_zeros((longest, *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor:
    """Sum over the ranks and return this rank's rows; `sizes` as above."""
    assert dim == 0
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]].contiguous()


def _select_forward(self: Any) -> Callable[..., Any]:
    ops = torch.ops.vllm
    return ops.moe_forward if self._shared_experts is None else ops.moe_forward_shared


CpuCommunicator.all_gatherv = _all_gatherv
CpuCommunicator.reduce_scatterv = _reduce_scatterv
MoERunner._select_forward = _select_forward
