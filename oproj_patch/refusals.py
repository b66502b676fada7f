"""What is refused before any process group or layer exists, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import topology
from .errors import OprojError
from .settings import TOGGLE, Settings


def check(vllm_config: Any, settings: Settings, dp_groups: Sequence[Sequence[int]]) -> None:
    """Refuse a configuration the shim cannot serve. Runs on every rank alike.

    vllm_config: vLLM's VllmConfig; dp_groups: global ranks of vLLM's data-parallel groups.
    Raises OprojError (OprojValueError where a value of ours is at fault).
    """
    _dense(vllm_config)
    topology.check_size(settings.size, len(dp_groups[0]))


def _dense(vllm_config: Any) -> None:
    model = getattr(vllm_config, "model_config", None)
    if model is None or is_moe(model):
        return
    raise OprojError(
        "OPROJ004",
        f"{TOGGLE} is set, but {getattr(model, 'model', 'the model')} is a dense model: its "
        "data-parallel ranks run independently of each other and cannot share an o_proj; "
        "accepted are mixture-of-experts models: unset the variable for this model.",
    )


def is_moe(model_config: Any) -> bool:
    """Whether vLLM runs the data-parallel ranks of this model in lock step."""
    known = getattr(model_config, "is_moe", None)
    if isinstance(known, bool):
        return known
    # Before ModelConfig.is_moe existed (vLLM < 0.18).
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    names = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    return any((getattr(text, name, 0) or 0) for name in names)
