"""In every process of a vLLM engine on a CPU: device graphs, emulated. A vLLM plugin.

vLLM finds it by the entry point in `plugin/`. It changes nothing of what the engine decides: it
supplies what the CPU platform says it lacks, with the shim and without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import wrapt

from demo.probe import WorkerProbe

from . import emulator, host

PROBE = "tests.graphs.engine.GraphProbe"


class GraphProbe(WorkerProbe):
    """The probe; it reports besides how many graphs were captured and replayed."""

    def oproj_counts(self) -> dict[str, Any]:
        return {"captures": emulator.Graph.captures, "replays": emulator.Graph.replays}


def load() -> None:
    """What vLLM calls in each of its processes."""
    host.give_graphs(emulator.Patches())
    wrapt.register_post_import_hook(_prepare_worker, "vllm.v1.worker.cpu_worker")


def _prepare_worker(module: Any) -> None:
    """Let the CPU's worker load, warm up and capture as the GPU's does."""
    from vllm.forward_context import DPMetadata
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    emulator.install()
    # The second runner announces the ranks' rows within the capture.
    DPMetadata.make = staticmethod(emulator.on_host(DPMetadata.make))
    worker: Any = module.CPUWorker
    initialize = worker.init_device

    def init_device(self: Any) -> None:
        initialize(self)
        host.give_compiler(emulator.Patches())

    worker.init_device = init_device
    worker.compile_or_warm_up_model = gpu_worker.Worker.compile_or_warm_up_model
    # Of kernels that a CPU does not have.
    setattr(gpu_worker, "kernel_warmup", lambda worker: None)  # noqa: B010
    module.CPUModelRunner.load_model = GPUModelRunner.load_model
    CPUMLAImpl.do_kv_cache_update = emulator.as_kernel(_writer(CPUMLAImpl.do_kv_cache_update))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from vllm.v1.worker.gpu import cudagraph_utils

        launcher: Any = importlib.import_module("triton.runtime.interpreter").GridExecutor
        # A launch is a call of Python there, which does not reach the dispatcher.
        launcher.__call__ = emulator.as_kernel(launcher.__call__, "triton")
        cudagraph_utils.graph_capture = lambda *_, **__: contextlib.nullcontext()
    builder = CPUMLABackend.get_builder_cls()
    builder._cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def _writer(write: Callable[..., None]) -> Callable[..., None]:
    """The CPU's write to the cache as a device's kernel: padded rows beyond the slots are left."""

    @functools.wraps(write)
    def write_slots(
        self: Any, latent: Any, rotary: Any, cache: Any, slots: Any, *others: Any
    ) -> None:
        rows = slots.numel()
        write(self, latent[:rows], rotary[:rows], cache, slots, *others)

    return write_slots
