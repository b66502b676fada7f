"""Run a function on several real processes, each a rank, with a deadline.

`run(world, "tests.bodies.layer:equal", args)` starts `world` fresh interpreters; each calls
the function with its rank and the arguments and its JSON-able result comes back in rank
order. Every process is killed, with all it started, when the deadline passes or one fails.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its result, or the text of the exception it raised."""

    rank: int
    result: Any
    error: str
    log: str
    seconds: float


class RankFailed(AssertionError):
    """A rank raised, died or outlived the deadline."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run(
    world: int,
    function: str,
    args: Mapping[str, Any] | None = None,
    *,
    seconds: float = 120,
    env: Mapping[str, str] | None = None,
    rank_env: Sequence[Mapping[str, str]] | None = None,
    python: str = sys.executable,
) -> list[Any]:
    """Results by rank; raises RankFailed with the rank's traceback when one did not return.

    The others have ten seconds to end when one has failed.
    """
    return results(
        outcomes_of(
            world,
            function,
            args,
            seconds=seconds,
            env=env,
            rank_env=rank_env,
            python=python,
            grace=10,
        )
    )


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    """Results by rank; raises RankFailed for the rank that failed first."""
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        first = min(failed, key=lambda outcome: ("deadline" in outcome.error, outcome.seconds))
        raise RankFailed(f"rank {first.rank}: {first.error}\n{first.log[-4000:]}")
    return [outcome.result for outcome in outcomes]


def outcomes_of(
    world: int,
    function: str,
    args: Mapping[str, Any] | None = None,
    *,
    seconds: float = 120,
    env: Mapping[str, str] | None = None,
    rank_env: Sequence[Mapping[str, str]] | None = None,
    python: str = sys.executable,
    stop_at: Sequence[int] | None = None,
    grace: float | None = None,
) -> list[Outcome]:
    """How every rank ended, whatever it was.

    stop_at: ranks whose end is waited for (default: all); the others are killed then.
    grace: seconds the others have to end when one has failed; None: until the deadline.
    """
    base = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(
            part for part in [str(ROOT), os.environ.get("PYTHONPATH", "")] if part
        ),
        **(env or {}),
    }
    if "OPROJ_TENSOR_PARALLEL_SIZE" not in (env or {}):
        base.pop("OPROJ_TENSOR_PARALLEL_SIZE", None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        try:
            for rank in range(world):
                out = Path(scratch, f"{rank}.json")
                with Path(scratch, f"{rank}.log").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [python, "-m", "tests.ranks", function, json.dumps(args or {}), out],
                            env={
                                **base,
                                "RANK": str(rank),
                                "LOCAL_RANK": str(rank),
                                **(rank_env[rank] if rank_env else {}),
                            },
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                            cwd=ROOT,
                        )
                    )
            ended = _wait(processes, started + seconds, stop_at, grace)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [
            _outcome(rank, Path(scratch), processes[rank].returncode, ended[rank] - started)
            for rank in range(world)
        ]


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    deadline: float,
    stop_at: Sequence[int] | None,
    grace: float | None,
) -> list[float]:
    ended: list[float] = [0.0] * len(processes)
    awaited = range(len(processes)) if stop_at is None else stop_at
    while True:
        for index, process in enumerate(processes):
            if not ended[index] and process.poll() is not None:
                ended[index] = time.monotonic()
                if process.returncode and grace is not None:
                    deadline = min(deadline, ended[index] + grace)
        if all(ended[index] for index in awaited) or time.monotonic() > deadline:
            now = time.monotonic()
            return [moment or now for moment in ended]
        time.sleep(0.02)


def _outcome(rank: int, scratch: Path, code: int | None, seconds: float) -> Outcome:
    log = (scratch / f"{rank}.log").read_text(errors="replace")
    path = scratch / f"{rank}.json"
    if not path.exists() or not path.stat().st_size:
        what = "outlived its deadline" if code == -signal.SIGKILL else f"died with code {code}"
        return Outcome(rank, None, what, log, seconds)
    told = json.loads(path.read_text())
    return Outcome(rank, told.get("result"), told.get("error", ""), log, seconds)


def _main() -> None:
    target, args, out = sys.argv[1:4]
    module, _, name = target.partition(":")
    told: dict[str, Any] = {}
    try:
        function = getattr(importlib.import_module(module), name)
        told["result"] = function(**json.loads(args))
    except BaseException as error:
        traceback.print_exc()
        told["error"] = f"{type(error).__name__}: {error}"
    Path(out).write_text(json.dumps(told))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if "error" in told else 0)


if __name__ == "__main__":
    _main()
