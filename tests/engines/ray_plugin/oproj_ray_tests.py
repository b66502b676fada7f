"""A vLLM platform plugin that lets vLLM's CPU platform run on Ray, and offers no platform.

vLLM asks Ray for devices by a name, which the CPU platform lacks. vLLM looks for its platform in
every process, also in Ray's, before it does anything else.
"""

from __future__ import annotations

from typing import Any

import wrapt

DEVICE = "oproj_device"
"""What the cluster has of custom resources: one for each rank."""


def offer() -> None:
    """What vLLM calls when it looks for its platform; None: this is no platform."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = DEVICE
    wrapt.register_post_import_hook(_place_workers, "vllm.v1.executor.ray_executor_v2")
    wrapt.register_post_import_hook(_place_engines, "vllm.v1.engine.core")


def _place_workers(module: Any) -> None:
    def node_and_device(self: Any) -> tuple[str, list[int]]:
        return module.ray.get_runtime_context().get_node_id(), [0]

    module.RayWorkerProc.get_node_and_physical_gpu_ids = node_and_device


def _place_engines(module: Any) -> None:
    def no_devices(self: Any, config: Any, *_: Any) -> None:
        config.parallel_config.assigned_physical_gpu_ids = None

    module.EngineCoreActorMixin._set_assigned_physical_gpu_ids = no_devices
