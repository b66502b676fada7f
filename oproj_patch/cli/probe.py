"""A vLLM worker extension that reports what a worker really holds and did.

Hand it to vLLM as ``worker_extension_cls="oproj_patch.cli.probe.WorkerProbe"`` and call
``collective_rpc("oproj_probe")``. It measures with and without the shim in the same way: o_proj
tensors are looked at right after the weights were loaded, before a quantization method or the CPU
backend re-packs them (the CPU backend leaves ``weight`` empty).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

_loaded: dict[str, dict[str, Any]] = {}
_models_seen = 0


def _record(model: Any) -> None:
    """Note shape, dtype and bytes of every o_proj parameter of a model just loaded."""
    global _models_seen
    _models_seen += 1
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "o_proj":
            continue
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        _loaded[name] = {
            "shape": list(weight.shape) if weight is not None else None,
            "dtype": str(weight.dtype).removeprefix("torch.") if weight is not None else None,
            "bytes": sum(p.numel() * p.element_size() for p in parameters.values()),
        }


def _watch_loading() -> None:
    """Call :func:`_record` between loading and post-processing. Imports vLLM."""
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading

    @functools.wraps(original)
    def record_then_process(model: Any, *args: Any, **kwargs: Any) -> Any:
        _record(model)
        return original(model, *args, **kwargs)

    base_loader.process_weights_after_loading = record_then_process


class WorkerProbe:
    """Mixed into vLLM's worker class in every worker process."""

    def oproj_probe(self, directory: str = "") -> dict[str, Any]:
        """Report this worker as a plain dict.

        ``dp_rank`` and ``tp_rank``; ``layers``: per o_proj layer name ``shape`` ([rows, columns]
        of the weight on this rank), ``dtype`` and ``bytes`` (all parameters of the layer);
        ``o_proj_bytes``: their sum; ``status``: the fields of ``oproj_patch.status()``.

        With ``directory`` the report is also written there, one file a worker: the server's RPC
        end point answers with the first data-parallel rank only.

        Raises ``RuntimeError`` when no model was loaded through vLLM's base loader.
        """
        from vllm.distributed import get_tensor_model_parallel_rank

        import oproj_patch

        if not _models_seen:
            raise RuntimeError(
                "the probe saw no model being loaded; it needs a loader that derives from "
                "vllm.model_executor.model_loader.base_loader.BaseModelLoader"
            )
        config = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        report = {
            "dp_rank": config.data_parallel_rank,
            "tp_rank": get_tensor_model_parallel_rank(),
            "layers": _loaded,
            "o_proj_bytes": sum(layer["bytes"] for layer in _loaded.values()),
            "status": dataclasses.asdict(oproj_patch.status()),
        }
        if directory:
            name = f"dp{report['dp_rank']}-tp{report['tp_rank']}.json"
            partial = Path(directory) / (name + ".partial")
            partial.write_text(json.dumps(report))
            partial.rename(Path(directory) / name)
        return report


# vLLM imports this module in a worker only, after its plugins and before it loads the model.
_watch_loading()
