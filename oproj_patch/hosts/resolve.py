"""The settings that a start resolves from the environment and the host's configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import OprojError
from ..settings import CONFIG_KEY, TOGGLE, Settings, merge
from .ascend_option import KEY, NESTED, configured


def resolved(settings: Settings, config: Any) -> Settings:
    """Return `settings` with what the VllmConfig adds: our own key, and with `auto` the size.

    Raises OprojError when they contradict each other, or `auto` finds no size.
    """
    additional = getattr(config, "additional_config", None)
    settings = merge(settings, additional)
    if not settings.auto:
        return settings
    found = {name: holder[KEY] for holder, name in configured(additional)}
    if settings.size:
        found[f"{CONFIG_KEY}.size"] = settings.size
    sound = found and all(type(value) is int and value > 1 for value in found.values())
    if not sound or len(set(found.values())) > 1:
        told = " and ".join(f"{name} = {value!r}" for name, value in found.items())
        raise OprojError(
            "OPROJ017",
            f"{TOGGLE} is auto, but --additional-config names {told or 'no size'}; accepted is one "
            f'integer of 2 or more, in {{"{CONFIG_KEY}": {{"size": N}}}} or {KEY} at the top level '
            f"or under {NESTED}: correct it, or set {TOGGLE} to a number.",
        )
    return replace(settings, size=next(iter(found.values())))
