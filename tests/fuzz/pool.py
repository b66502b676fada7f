"""Rank processes that live through many examples; each answer has a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import ranks


class Pool:
    """`size` processes of `tests.fuzz.rank`; a context manager that leaves none behind."""

    def __init__(self, size: int, log: Path) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.answers: list[Any] = []
        self.logs = [log / f"rank{rank}.log" for rank in range(size)]
        env = {name: value for name, value in os.environ.items() if not name.startswith("OPROJ_")}
        env |= {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_DIST_IDENT": f"fuzz-{os.getpid()}",
        }
        for rank in range(size):
            theirs, mine = os.pipe()[::-1]
            with self.logs[rank].open("wb") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.fuzz.rank"],
                    env=env | {"RANK": str(rank), "ANSWERS": str(theirs)},
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    cwd=ranks.ROOT,
                    start_new_session=True,
                    text=True,
                )
            os.close(theirs)
            self.processes.append(process)
            self.answers.append(os.fdopen(mine, "r"))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process, answers in zip(self.processes, self.answers, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            answers.close()
            if process.stdin is not None:
                process.stdin.close()

    def ask(self, command: str, arguments: dict[str, Any], seconds: float) -> list[Any]:
        """Every rank's result; raises AssertionError when one fails or is late."""
        line = json.dumps([command, arguments]) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        deadline = time.monotonic() + seconds
        told = []
        for rank, answers in enumerate(self.answers):
            ready, _, _ = select.select([answers], [], [], max(0.0, deadline - time.monotonic()))
            text = answers.readline() if ready else ""
            if not text:
                log = self.logs[rank].read_text(errors="replace")[-2000:]
                raise AssertionError(f"rank {rank}: no answer within {seconds:g} s\n{line}{log}")
            told.append(json.loads(text))
        for rank, answer in enumerate(told):
            assert "error" not in answer, f"rank {rank}: {line}{answer['error']}"
        return [answer["result"] for answer in told]
