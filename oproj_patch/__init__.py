"""Tensor parallelism for the attention output projection across data-parallel ranks of vLLM.

Set `OPROJ_TENSOR_PARALLEL_SIZE=N` and start vLLM, or `import oproj_patch` before it builds
its model. While the toggle is off nothing but this module and `_version` is imported.
"""

from __future__ import annotations

import os
import sys

from ._version import __version__

TYPE_CHECKING = False  # type checkers take this name for true; importing `typing` costs time
if TYPE_CHECKING:
    from typing import Any

    from .activation import Status, disable, enable, status
    from .errors import OprojError, OprojValueError

__all__ = ["OprojError", "OprojValueError", "Status", "__version__", "disable", "enable", "status"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import activation, errors

    return getattr(errors if name.startswith("Oproj") else activation, name)


def plugin() -> None:
    """Entry point `vllm.general_plugins: oproj_patch`; vLLM calls it in every process."""
    if _asked_for():
        from . import activation

        activation.plugin_loaded()


def _asked_for() -> bool:
    # Settled without settings.py: off must cost nothing, and dataclasses alone costs 5 ms.
    return os.environ.get("OPROJ_TENSOR_PARALLEL_SIZE", "").strip() not in ("", "0", "1")


def _command_line() -> bool:
    # `oproj-patch` builds no model, and shows the environment as vLLM would find it.
    script = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119
    # It is -m while runpy imports the package of the module to run.
    return script.startswith("oproj-patch") or (script == "-m" and __name__ in sys.orig_argv)


if _asked_for() and not _command_line():
    from . import activation as _activation

    _activation.activate()
