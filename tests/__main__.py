"""Run the tests: `python -m tests [PYTEST OPTIONS]`.

Without options in two parts, which take less time than one: first, two files at a time, what
mostly waits for one thread of Python; then, one by one, what keeps all cores of a small machine
busy or says how long it may take (engines, faults).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ALONE = (
    "engines/test_demo.py",
    "engines/test_mtp.py",
    "engines/test_offline.py",
    "engines/test_releases.py",
    "engines/test_server.py",
    "faults/test_engines.py",
    "faults/test_faults.py",
    "faults/test_restart.py",
    "faults/test_two_nodes.py",
    "test_metrics.py",
)


def main(arguments: Sequence[str]) -> int:
    """Exit code of pytest, of the first part that failed; 5 when a part had no test."""
    if arguments:
        return _pytest(arguments)
    alone = [str(HERE / name) for name in ALONE]
    # The directory of the hosts by name: its options and its summary are known from the start then.
    together = [*(f"--ignore={path}" for path in alone), str(HERE / "hosts"), str(HERE)]
    parts = (["-n", "2", "--dist", "loadfile", *together], alone)
    codes = [_pytest([*part, "--durations=25"]) for part in parts]
    return next(filter(None, codes), 0)


def _pytest(arguments: Sequence[str]) -> int:
    return subprocess.call([sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
