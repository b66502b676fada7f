"""What vLLM's CPU platform lacks to run device graphs: the same with the shim and without it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from . import emulator


def is_ascend() -> bool:
    """Whether vllm-ascend is the host of this process."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__.startswith("vllm_ascend")


def of_first_graphs() -> bool:
    """Whether this vllm-ascend has a piecewise backend of its own, as only 0.9.1 has."""
    return importlib.util.find_spec("vllm_ascend.compilation.piecewise_backend") is not None


def answer_for_npu(undo: emulator.Patches) -> None:
    """Answer what vllm-ascend asks of the device: memory in use, the chip, weak references."""
    import torch_npu
    from vllm.platforms import current_platform
    from vllm_ascend import utils

    undo.put(torch_npu._C, "_weak_ref_tensor", lambda tensor: tensor)
    if hasattr(utils, "AscendSocVersion"):  # what the worker of 0.11 asks the device
        undo.put(utils, "_ascend_soc_version", utils.AscendSocVersion.A3)
    platform = type(current_platform)
    undo.put(platform, "is_pin_memory_available", classmethod(lambda cls: False))
    undo.put(platform, "get_current_memory_usage", classmethod(lambda cls, device=None: 0.0))
    undo.put(platform, "graph_pool_handle", staticmethod(emulator.pool_handle))


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within it tensors are ordinary CPU tensors: some releases write `npu`, or always pin."""

    def ordinary(create: Any) -> Any:
        def created(*args: Any, pin_memory: bool = False, device: Any = None, **given: Any) -> Any:
            where = "cpu" if str(device).startswith("npu") else device
            return create(*args, device=where, **given)

        return created

    to = torch.Tensor.to

    def moved(tensor: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        return tensor if args == ("npu",) else to(tensor, *args, **given)

    with emulator.Patches() as undo:
        for name in ("zeros", "empty", "ones", "full", "arange", "tensor"):
            undo.put(torch, name, ordinary(getattr(torch, name)))
        undo.put(torch.Tensor, "pin_memory", lambda self, *_: self)
        undo.put(torch.Tensor, "to", moved)
        yield


def worker_class() -> type:
    """The host's worker, which decides what an idle rank runs."""
    names = ["vllm.v1.worker.gpu_worker"]
    if is_ascend():
        names = ["vllm_ascend.worker.worker_v1", "vllm_ascend.worker.worker"]
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            found: type = module.NPUWorker if is_ascend() else module.Worker
            return found
    raise ImportError(f"no worker in {names}")


def give_graphs(undo: emulator.Patches) -> None:
    """Let vLLM's CPU platform have device graphs, and leave compilation and scheduling alone.

    undo: takes everything away again when it is closed.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep_settings(config: Any) -> None:
        kept = (config.compilation_config, config.scheduler_config, config.model_config)
        before = [copy.copy(vars(settings)) for settings in kept]
        check(config)
        for settings, values in zip(kept, before, strict=True):
            vars(settings).update(values)

    wrapper = "vllm.compilation.cuda_graph.CUDAGraphWrapper"
    backend = "vllm.compilation.cuda_piecewise_backend.CUDAPiecewiseBackend"
    undo.put(platform, "check_and_update_config", staticmethod(keep_settings))
    undo.put(platform, "support_static_graph_mode", classmethod(lambda cls: True))
    undo.put(platform, "get_static_graph_wrapper_cls", classmethod(lambda cls: wrapper))
    undo.put(platform, "get_piecewise_backend_cls", classmethod(lambda cls: backend))
    undo.put(platform, "get_current_memory_usage", classmethod(lambda cls, device=None: 0.0))
    undo.put(platform, "num_compute_units", classmethod(lambda cls, *_: 1))
    undo.put(platform, "graph_pool_handle", staticmethod(emulator.pool_handle))


@contextlib.contextmanager
def on_cuda() -> Iterator[None]:
    """Within it vLLM's CPU platform has the graphs and the streams of a real GPU.

    The emulator's class counts captures and replays here as well.
    """

    class Counted(torch.cuda.CUDAGraph):  # type: ignore[misc]
        def capture_end(self) -> None:
            super().capture_end()
            emulator.Graph.captures += 1

        def replay(self) -> None:
            emulator.Graph.replays += 1
            super().replay()

    from vllm.platforms import current_platform

    with emulator.Patches() as undo, torch.cuda.stream(torch.cuda.Stream()):
        undo.put(torch.cuda, "CUDAGraph", Counted)
        pool = staticmethod(lambda *_: torch.cuda.graph_pool_handle())
        undo.put(type(current_platform), "graph_pool_handle", pool)
        yield


@contextlib.contextmanager
def configured() -> Iterator[None]:
    """Within it releases that ask for CUDA instead of for device graphs are told so."""
    from vllm.platforms import current_platform, interface

    with emulator.Patches() as undo:
        if "support_static_graph_mode" not in vars(interface.Platform):
            undo.put(type(current_platform), "is_cuda_alike", lambda self: True)
        yield


def give_compiler(undo: emulator.Patches) -> None:
    """Leave out what a graph runner asks of a device's build alone; imports vLLM's runner."""
    # Fusions for Inductor, which does not run. 0.9.1 cannot import them without its kernels.
    if importlib.util.find_spec("vllm.compilation.passes") is None:
        name = "vllm.compilation.pass_manager"
        try:
            importlib.import_module(name)
        except AttributeError:
            sys.modules[name] = ModuleType(name)
            setattr(sys.modules[name], "PostGradPassManager", SimpleNamespace)  # noqa: B010
    from vllm.compilation import backends
    from vllm.v1.worker import gpu_model_runner

    undo.put(backends.VllmBackend, "configure_post_pass", lambda self: None)
    # Not in CPU builds. An emulated graph keeps its memory, so a strong reference serves.
    for operators in (torch.ops._C, torch.ops._C_ascend):
        undo.put(operators, "weak_ref_tensor", lambda tensor: tensor)
    # It prepares communicators that a CPU does not have.
    undo.put(gpu_model_runner, "graph_capture", lambda *_, **__: contextlib.nullcontext())
    _let_dynamo_inline(undo)
    with contextlib.suppress(ImportError):
        from vllm.v1.worker import workspace

        workspace.init_workspace_manager(torch.device("cpu"))


def _let_dynamo_inline(undo: emulator.Patches) -> None:
    """Older releases exchange a function of Dynamo's for one that lacks torch 2.13's argument."""
    from torch._dynamo import symbolic_convert
    from vllm.compilation import decorators

    if "patched_inline_call(parent, func, args, kwargs)" not in inspect.getsource(decorators):
        return
    translator: Any = symbolic_convert.InstructionTranslatorBase

    def inline(self: Any, fn: Any, args: Any, kwargs: Any, **_: Any) -> Any:
        return symbolic_convert.InliningInstructionTranslator.inline_call(self, fn, args, kwargs)

    undo.put(translator, "inline_user_function_return", inline)
