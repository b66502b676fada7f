"""vllm-ascend's own o_proj option, and who acts on it.

vllm-ascend reads it in the constructor of its `AscendConfig`, in the parent and in every worker. Up
to 0.26 the constructor reads vLLM's `additional_config`; since 0.27 it gets what is in there as
arguments. With the toggle `auto` we serve the option, so we take it out of sight while that
constructor runs; with a number we refuse it. We take our own key out of sight as well, because a
release may refuse a key that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .. import releases
from ..errors import OprojError
from ..settings import CONFIG_KEY, TOGGLE, Settings, merge
from .seam import Seam

CONFIG = "vllm_ascend.ascend_config"
KEY = "oproj_tensor_parallel_size"
NESTED = "finegrained_tp_config"


def configured(additional_config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (dictionary that holds the option, its full name) for each place where it is set."""
    if not isinstance(additional_config, dict):
        return
    places = {KEY: additional_config, f"{NESTED}.{KEY}": additional_config.get(NESTED)}
    for name, holder in places.items():
        if isinstance(holder, dict) and holder.get(KEY):
            yield holder, name


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


def seams(settings: Settings) -> tuple[Seam, Seam]:
    """Return the seams of vllm-ascend that are installed as soon as their module is imported."""

    def constructed(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        additional = vllm_config.additional_config
        return _out_of_sight(additional, settings, lambda: wrapped(*args, **kwargs))

    def made(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return _out_of_sight(kwargs, settings, lambda: wrapped(*args, **kwargs))

    why = "serve vllm-ascend's own o_proj option, or refuse it beside a number"
    return (
        Seam(
            CONFIG, "AscendConfig.__init__", constructed, why, ("vllm_config",), until="0.26.0rc1"
        ),
        # The class's name, because pydantic replaces the constructor when the class is first used.
        Seam(CONFIG, "AscendConfig", made, why, (NESTED,), since="0.30.0rc2"),
    )


def seam(settings: Settings, version: str) -> Seam:
    """Return the one of `seams` for this version of vllm-ascend."""
    first, last = seams(settings)
    return first if releases.in_range(version, first.since, first.until) else last


def _out_of_sight(additional: Any, settings: Settings, construct: Callable[[], Any]) -> Any:
    """Return what `construct` does while the option and our own key are not in `additional`.

    Raises OprojError where the option is set beside a number of ours.
    """
    taken: list[tuple[dict[str, Any], str, Any]] = []
    for holder, name in configured(additional):
        if not settings.auto:
            raise OprojError(
                "OPROJ016",
                f"{TOGGLE} is {settings.size} and additional_config.{name} is {holder[KEY]!r}: "
                f"one o_proj cannot be sharded twice; set {TOGGLE}=auto, or remove one of the "
                "two.",
            )
        taken.append((holder, KEY, holder.pop(KEY)))
    if isinstance(additional, dict) and CONFIG_KEY in additional:
        taken.append((additional, CONFIG_KEY, additional.pop(CONFIG_KEY)))
    try:
        return construct()
    finally:
        for holder, key, value in taken:  # back into the same dictionaries: others hold them
            holder[key] = value
