"""The settings that a start resolves from the environment and the host's configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import OprojError
from ..settings import TOGGLE, Settings, merge
from . import ascend_option


def resolved(settings: Settings, config: Any) -> Settings:
    """Return `settings` with what the VllmConfig adds: our own key, and with `auto` the size.

    Raises OprojError when they contradict each other, or `auto` finds no size.
    """
    additional = getattr(config, "additional_config", None)
    settings = merge(settings, additional)
    if not settings.auto:
        return settings
    theirs = ascend_option.size_in(additional)
    if theirs and settings.size not in (0, theirs):
        raise OprojError(
            "OPROJ017",
            f"{TOGGLE} is auto, and in --additional-config oproj_patch.size is {settings.size} "
            f"but {ascend_option.KEY} is {theirs}; accepted is one size: remove one of the two.",
        )
    if not (size := settings.size or theirs):
        raise OprojError(
            "OPROJ017",
            f"{TOGGLE} is auto, but --additional-config names no size; accepted is "
            '{"oproj_patch": {"size": N}}, or oproj_tensor_parallel_size at the top level or '
            f"under finegrained_tp_config: add it, or set {TOGGLE} to a number.",
        )
    return replace(settings, size=size)
