"""What vLLM's CPU backend lacks to run pipeline stages without graphs. Test support only.

Loaded in worker processes as `worker_extension_cls="tests.engines.pipeline.StageProbe"`. In eager
mode the CPU runner never makes the buffers into which a later stage receives.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from demo.probe import WorkerProbe

_load_model = CPUModelRunner.load_model


class StageProbe(WorkerProbe):
    """The probe, in a worker of a pipeline stage; it reports besides: `pp_rank`, its stage."""

    def oproj_probe(self, directory: str = "") -> dict[str, Any]:
        return super().oproj_probe(directory) | {"pp_rank": get_pp_group().rank_in_group}


@functools.wraps(_load_model)
def _load_model_and_make_buffers(self: Any, *args: Any, **kwargs: Any) -> None:
    _load_model(self, *args, **kwargs)
    if not get_pp_group().is_first_rank:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
        )


CPUModelRunner.load_model = _load_model_and_make_buffers
