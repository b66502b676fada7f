"""Run the tests: `python -m tests [PYTEST OPTIONS]`.

Without options in two parts, which take less time than one: first, two files at a time, what
mostly waits for one thread of Python; then, one by one, what keeps all cores of a small machine
busy (engines, many ranks, the releases of the hosts).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
BUSY = ("e2e", "faults", "fuzz", "hosts", "test_metrics.py")


def main(arguments: Sequence[str]) -> int:
    """Exit code of pytest, of the first part that failed; 5 when a part had no test."""
    if arguments:
        return _pytest(arguments)
    busy = [str(HERE / name) for name in BUSY]
    parts = (["-n", "2", "--dist", "loadfile", *(f"--ignore={path}" for path in busy)], busy)
    codes = [_pytest([*part, "--durations=25"]) for part in parts]
    return next(filter(None, codes), 0)


def _pytest(arguments: Sequence[str]) -> int:
    return subprocess.call([sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
