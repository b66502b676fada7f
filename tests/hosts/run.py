"""Run the tests of one host, or of all.

python -m tests.hosts.run [vllm|ascend VERSION [PYTEST OPTIONS]]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import overlay


def main(arguments: Sequence[str]) -> int:
    """Fetch what is missing, run pytest, return its exit status."""
    if not arguments:
        overlay.main(["ensure", "all"])
        return pytest.main([str(Path(__file__).parent)])
    kind, version, *options = arguments
    overlay.main(["ensure", kind, version])
    return pytest.main([str(Path(__file__).parent), "--host", f"{kind}-{version}", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
