"""Milliseconds that importing oproj_patch costs while it is off.

    python benchmarks/import_time.py

Interpreters that import it, and interpreters that import nothing, are started by turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TURNS = 41


def milliseconds(code: str) -> float:
    environment = {k: v for k, v in os.environ.items() if k != "OPROJ_TENSOR_PARALLEL_SIZE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    nothing: list[float] = []
    package: list[float] = []
    for _ in range(TURNS):
        nothing.append(milliseconds("pass"))
        package.append(milliseconds("import oproj_patch"))
    added = statistics.median(b - a for a, b in zip(nothing, package, strict=True))
    print(
        f"interpreter {statistics.median(nothing):.1f} ms, with oproj_patch (off) "
        f"{statistics.median(package):.1f} ms, added {added:.2f} ms"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
