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

from .errors import OprojError
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


def watch(settings: Settings) -> Callable[[], None]:
    """Stand between vllm-ascend and its option, now or once it is imported; returns the undo."""
    patched: list[tuple[Any, Any]] = []
    watching = [True]

    def patch(module: Any) -> None:
        if not watching:
            return
        import wrapt

        original = module.AscendConfig.__init__
        module.AscendConfig.__init__ = wrapt.FunctionWrapper(original, constructed)
        patched.append((module.AscendConfig, original))

    def constructed(wrapped: Any, _: Any, args: Any, kwargs: Any) -> None:
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        with _out_of_sight(vllm_config.additional_config, settings):
            wrapped(*args, **kwargs)

    if CONFIG in sys.modules:
        patch(sys.modules[CONFIG])
    else:
        import wrapt

        wrapt.register_post_import_hook(patch, CONFIG)

    def undo() -> None:
        watching.clear()
        for cls, original in patched:
            cls.__init__ = original
        patched.clear()

    return undo


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
