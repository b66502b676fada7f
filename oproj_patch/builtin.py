"""vllm-ascend's own o_proj option, and who acts on it.

The option lives in vLLM's `additional_config`, which vllm-ascend reads in the constructor of
its `AscendConfig`, in the parent and in every worker. With the toggle `auto` the shim serves
the option: it is out of sight while that constructor runs, and stays where it is otherwise.
With a number, the option is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import hosts
from .errors import OprojError
from .seams.registry import Installed, Seam, install, undo
from .settings import TOGGLE, Settings

CONFIG = "vllm_ascend.ascend_config"
KEY = "oproj_tensor_parallel_size"
NESTED = "finegrained_tp_config"


def configured(additional_config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(dictionary that holds the option, its full name), for each place where it is set."""
    if not isinstance(additional_config, dict):
        return
    for holder, name in (
        (additional_config, KEY),
        (additional_config.get(NESTED), f"{NESTED}.{KEY}"),
    ):
        if isinstance(holder, dict) and holder.get(KEY):
            yield holder, name


def seam(settings: Settings) -> Seam:
    """The one symbol of vllm-ascend that is patched as soon as its module is imported."""

    def constructed(wrapped: Any, _: Any, args: Any, kwargs: Any) -> None:
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        with _out_of_sight(vllm_config.additional_config, settings):
            wrapped(*args, **kwargs)

    return Seam(
        module=CONFIG,
        path="AscendConfig.__init__",
        wrapper=constructed,
        parameters=("vllm_config",),
        why="Serve vllm-ascend's own o_proj option, or refuse it beside a number.",
        lower="The option is read here, once, before any group or layer exists.",
        unpatched="vllm-ascend would shard the same layers, or refuse to start in eager mode.",
        upstream="vllm_ascend/ascend_config.py",
        remove="The option is gone.",
    )


def watch(settings: Settings) -> Callable[[], None]:
    """Stand between vllm-ascend and its option, now or once it is imported; returns the undo.

    Patching raises OprojError when the constructor is not as expected.
    """
    patched: list[Installed] = []
    watching = [True]

    def patch(_: Any) -> None:
        if watching:
            found = hosts.distribution("vllm-ascend") or "unknown"
            patched.extend(install([seam(settings)], f"vllm-ascend {found}"))

    if CONFIG in sys.modules:
        patch(None)
    else:
        import wrapt

        wrapt.register_post_import_hook(patch, CONFIG)

    def stop() -> None:
        watching.clear()
        undo(patched)
        patched.clear()

    return stop


@contextmanager
def _out_of_sight(additional_config: Any, settings: Settings) -> Iterator[None]:
    """Take the option out of the same dictionaries, which the host may change meanwhile."""
    taken = []
    for holder, name in configured(additional_config):
        if not settings.auto:
            raise OprojError(
                "OPROJ016",
                f"{TOGGLE} is {settings.size} and additional_config.{name} is {holder[KEY]!r}: "
                f"one o_proj cannot be sharded twice; set {TOGGLE}=auto to serve the option, or "
                "take one of the two away.",
            )
        taken.append((holder, holder.pop(KEY)))
    try:
        yield
    finally:
        for holder, value in taken:
            holder[KEY] = value
