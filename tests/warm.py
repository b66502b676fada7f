"""Ranks forked from one process that has imported vLLM, so that a start costs nothing.

`Warm` talks to that process; run as a module this file is the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import ranks

IMPORTED_FIRST = (
    "vllm.distributed",
    "vllm.engine.arg_utils",
    "vllm.model_executor.models.deepseek_v2",
    "tests.faults.bodies",
)


class Warm:
    """A context manager; nothing that it started outlives it."""

    def __enter__(self) -> Warm:
        env = {name: value for name, value in os.environ.items() if not name.startswith("OPROJ_")}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ranks.ROOT,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()

    def outcomes_of(
        self,
        world: int,
        function: str,
        args: Mapping[str, Any],
        *,
        seconds: float,
        env: Mapping[str, str],
        rank_env: Sequence[Mapping[str, str]] | None = None,
        stop_at: Sequence[int] | None = None,
        grace: float | None = None,
    ) -> list[ranks.Outcome]:
        """As `tests.ranks.outcomes_of`."""
        given = {name: value for name, value in locals().items() if name != "self"}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        return [ranks.Outcome(**outcome) for outcome in told]

    def run(
        self,
        world: int,
        function: str,
        args: Mapping[str, Any],
        *,
        seconds: float = 120,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """As `tests.ranks.run`."""
        told = self.outcomes_of(world, function, args, seconds=seconds, env=env or {}, grace=10)
        return ranks.results(told)


class Forked:
    """A child of this process, with what `tests.ranks` needs of a `Popen`."""

    def __init__(self, function: str, args: str, out: Path, env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.update(env)
        sys.argv[1:] = [function, args, str(out)]
        ranks._main()

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def end(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork(
    world: int,
    function: str,
    args: dict[str, Any],
    seconds: float,
    env: dict[str, str],
    rank_env: list[dict[str, str]] | None,
    stop_at: list[int] | None,
    grace: float | None,
) -> list[ranks.Outcome]:
    shared = {"MASTER_PORT": str(ranks.free_port()), "WORLD_SIZE": str(world), **env}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        forked: list[Any] = []
        try:
            for rank in range(world):
                own = rank_env[rank] if rank_env else {}
                out = Path(scratch, f"{rank}.json")
                numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                forked.append(Forked(function, json.dumps(args), out, shared | numbers | own))
            ended = ranks._wait(forked, started + seconds, stop_at, grace)
        finally:
            for child in forked:
                child.end()
        return [
            ranks._outcome(rank, Path(scratch), child.returncode, ended[rank] - started)
            for rank, child in enumerate(forked)
        ]


def main() -> None:
    # So that a row in progress ends its ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTED_FIRST:
        importlib.import_module(name)
    try:
        for line in sys.stdin:
            outcomes = fork(**json.loads(line))
            answers.write(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]) + "\n")
            answers.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)  # vLLM's own way out takes seconds


if __name__ == "__main__":
    main()
