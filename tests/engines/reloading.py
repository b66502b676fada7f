"""A worker extension whose weights stay as they were loaded, and are loaded anew. Test support.

Loaded in worker processes as `worker_extension_cls="tests.engines.reloading.Probe"`. vLLM's CPU
backend packs weights and drops the originals; a GPU keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from demo.probe import WorkerProbe

from .weights import STRIDE, digest


class Probe(WorkerProbe):
    """The probe; it reports besides a digest of every o_proj weight as it is now."""

    def oproj_counts(self) -> dict[str, Any]:
        return {"digests": {name: digest(weight) for name, weight in self._o_projs()}}

    def oproj_damage(self) -> None:
        """Fill the weights with noise."""
        for _, weight in self._o_projs():
            weight.normal_()

    def oproj_load_full(self, model: str) -> None:
        """Load all tensors of a checkpoint, whole, through the model's own loader."""
        self.model_runner.model.load_weights(load_file(Path(model, "model.safetensors")).items())  # type: ignore[attr-defined]

    def oproj_load_sparse(self, model: str, more: float) -> None:
        """Replace every third element of the weights by the checkpoint's plus `more`."""
        patches = []
        for name, whole in load_file(Path(model, "model.safetensors")).items():
            if name.endswith("o_proj.weight"):
                places = torch.arange(0, whole.numel(), STRIDE)
                values = whole.flatten()[places] + more
                shape = tuple(whole.shape)
                patches.append(CheckpointWeightPatch(name, shape, whole.dtype, values, places))
        load_checkpoint_weight_patches(self.model_runner.model, patches)  # type: ignore[attr-defined]

    def _o_projs(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model_runner.model.named_parameters():  # type: ignore[attr-defined]
            if name.endswith("o_proj.weight"):
                yield name, parameter.data


def _keep(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = _keep
