"""What the hosts have in common: their versions, the version gate, the resolved settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import releases
from ..errors import OprojError
from ..settings import SKIP_VERSION_CHECK, TOGGLE, Settings, merge
from ..sharding.rows import HostPass
from . import ascend_option


class Host(HostPass):
    """One host of this process.

    name: its distribution; versions: distribution -> version, this package's own included.
    settings: those of the current start.
    """

    name: str
    settings: Settings

    def __init__(self, versions: Mapping[str, str]) -> None:
        self.versions = dict(versions)
        self.settings = Settings()

    def __str__(self) -> str:
        names = dict.fromkeys((self.name, "vllm"))
        return " on ".join(f"{name} {self.versions[name]}" for name in names)

    def check_version(self, settings: Settings) -> None:
        """Raise OprojError for an untested release, unless the check is switched off."""
        problem = releases.untested(self.versions["vllm"], self.versions.get("vllm-ascend"))
        if problem and not settings.skip_version_check:
            raise OprojError(
                "OPROJ009",
                f"{problem}; install a tested release, or set {SKIP_VERSION_CHECK}=1 to try this "
                f"one after its symbols have been checked, or unset {TOGGLE}.",
            )


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
