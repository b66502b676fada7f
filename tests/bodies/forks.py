"""In a process: calls in forks of it, which share what it has imported."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run(calls: Sequence[Callable[[], Any]], seconds: float = 100, grace: float = 10) -> list[Any]:
    """Every call in a fork of its own, at the same time; their JSON-able results, in order.

    A call that raises, dies or takes longer than `seconds` has `{"error": TEXT}` as its result;
    when one has failed, the others have `grace` seconds to end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, str(index)) for index in range(len(calls))]
        pids = [_fork(call, file) for call, file in zip(calls, files, strict=True)]
        ends = _wait(pids, time.monotonic() + seconds, grace)
        return [
            json.loads(file.read_text()) if file.exists() else {"error": f"ended with {end}"}
            for file, end in zip(files, ends, strict=True)
        ]


def _fork(call: Callable[[], Any], file: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        told, code = call(), 0
    except BaseException:
        told = {"error": traceback.format_exc()}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(told))
    partial.rename(file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: Sequence[int], deadline: float, grace: float) -> list[int]:
    """The status with which each ended; what runs at the deadline is killed."""
    ended: dict[int, int] = {}
    while len(ended) < len(pids):
        for pid in pids:
            if pid in ended:
                continue
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = status
                if status:
                    deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.01)
    return [ended[pid] for pid in pids]
