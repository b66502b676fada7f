"""In a rank: all that can be seen on one vllm-ascend release with one start."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .ascend import attempt, build, configured, model_steps, worker
from .ascend_drafter import proposed
from .ascend_kernels import kernels, quantization_kernels
from .ascend_layers import drafter_layer, layers_refused, one_attention, quantized


def host(
    model: str,
    dp: int,
    plan: list[list[int]],
    kinds: Sequence[str] = (),
    others: Mapping[str, str] = MappingProxyType({}),
    drafts: list[list[int]] | None = None,
    tp: int = 1,
    **engine: Any,
) -> dict[str, Any]:
    """All that can be seen on one release with one start of the processes.

    others: name and directory of further models, built and run after the first; drafts: see
    `proposed`.
    """
    import oproj_patch

    with worker(model, dp, tp, **engine) as config:
        from vllm_ascend.ascend_config import get_ascend_config

        theirs = get_ascend_config()
        option = getattr(theirs, "finegrained_tp_config", theirs)
        kernels()
        quantization_kernels()
        built = build(config)
        status = oproj_patch.status()
        result: dict[str, Any] = {
            "option_seen_by_host": getattr(option, "oproj_tensor_parallel_size", None),
            "option_kept": config.additional_config,
            "size": status.size,
            "ranks": list(status.otp_ranks),
            "layers": status.layers,
            "seams": list(status.seams),
            "steps": attempt(lambda: model_steps(config, built, plan)),
        }
        for place, kind in enumerate(kinds, start=10):
            result[kind] = attempt(functools.partial(quantized, config, kind, place))
        if tp == 1:
            result["drafter"] = attempt(lambda: drafter_layer(config, 40, [[3, 5], [2, 1], [1, 4]]))
        if kinds and importlib.util.find_spec("vllm_ascend.ops.linear_op"):
            result["refused"] = attempt(lambda: layers_refused(config, 30))
        if drafts:
            result["proposer"] = attempt(
                functools.partial(proposed, model, dp, steps=3, plan=drafts, **engine)
            )
        for name, directory in others.items():
            result[name] = attempt(functools.partial(another, directory, dp, plan, **engine))
        with contextlib.suppress(ImportError):
            from vllm_ascend.models.deepseek_v2 import CustomDeepseekV2MLAAttention

            theirs.enable_prefill_optimizations = True
            result["scattering"] = attempt(
                lambda: one_attention(config, CustomDeepseekV2MLAAttention, 20)
            )
        return result


def another(model: str, dp: int, plan: list[list[int]], **engine: Any) -> dict[str, Any]:
    """`model_steps` of one more model in the same processes and groups."""
    from vllm.config import set_current_vllm_config

    config = configured(model, dp, **engine)
    with set_current_vllm_config(config):
        return model_steps(config, build(config), plan)
