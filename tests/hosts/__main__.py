"""Run the tests of one host, or of all.

python -m tests.hosts [vllm|ascend VERSION] [PYTEST OPTIONS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import wheels


def main(arguments: Sequence[str]) -> int:
    """Fetch what is missing, run pytest, return its exit status."""
    room = str(Path(__file__).parent)
    if not arguments or arguments[0] not in ("vllm", "ascend"):
        return pytest.main([room, *arguments])
    kind, version, *options = arguments
    wheels.main(["ensure", kind, version])
    return pytest.main([room, "--host", f"{kind}-{version}", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
