"""A vLLM worker extension that reports what a worker holds and did.

Hand it to vLLM as `worker_extension_cls="demo.probe.WorkerProbe"` and call
`collective_rpc("oproj_probe")`. vLLM imports this module in a worker only, after its plugins and
before it loads the model. The probe works the same without the shim.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader import base_loader

_loaded: dict[str, dict[str, Any]] = {}
_process_weights = base_loader.process_weights_after_loading


@functools.wraps(_process_weights)
def _record_then_process(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Note every o_proj before the CPU backend re-packs it, which leaves `weight` empty."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("o_proj", "wo_a", "wo_b"):
            parameters = dict(module.named_parameters(recurse=False))
            weight = parameters["weight"]
            _loaded[name] = {
                "shape": list(weight.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "bytes": sum(p.numel() * p.element_size() for p in parameters.values()),
            }
    return _process_weights(model, *args, **kwargs)


base_loader.process_weights_after_loading = _record_then_process


class WorkerProbe:
    """Mixed into vLLM's worker class in every worker process."""

    def oproj_probe(self, directory: str = "") -> dict[str, Any]:
        """Report this worker as a plain dict.

        `dp_rank` and `tp_rank`; `layers`: per o_proj its `shape` ([rows, columns] of the weight
        on this rank), `dtype` and `bytes` (all parameters); `o_proj_bytes`: their sum; `status`:
        the fields of `oproj_patch.status()`, or that nothing is enabled where the package has not
        been imported: the probe itself does not import it.

        With `directory` each worker also writes its report there, because the server's RPC end
        point answers for the first data-parallel rank only.

        Raises `RuntimeError` when no o_proj was loaded through vLLM's base loader.
        """
        if not _loaded:
            raise RuntimeError(
                "the probe saw no o_proj being loaded: use a model that has one and a loader "
                "derived from vLLM's BaseModelLoader"
            )
        package = sys.modules.get("oproj_patch")
        absent = {"enabled": False, "layers": 0, "exchanges": 0}
        report = {
            "dp_rank": self.vllm_config.parallel_config.data_parallel_rank,  # type: ignore[attr-defined]
            "tp_rank": get_tensor_model_parallel_rank(),
            "layers": _loaded,
            "o_proj_bytes": sum(layer["bytes"] for layer in _loaded.values()),
            "status": dataclasses.asdict(package.status()) if package else absent,
            **self.oproj_counts(),
        }
        if directory:
            path = Path(directory) / f"dp{report['dp_rank']}-tp{report['tp_rank']}.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(report))
            partial.rename(path)
        return report

    def oproj_counts(self) -> dict[str, Any]:
        """Return what a subclass counts, for the report."""
        return {}
