"""The launcher of ranks: results, errors, deadlines, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import launch


def squared(number: int) -> tuple[int, int]:
    return int(os.environ["RANK"]), number**2


def test_results_come_back_by_rank() -> None:
    assert launch.run(2, squared, 7, fresh=True) == [(0, 49), (1, 49)]


def fails_on_one(kind: str) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)
    value = 41
    if kind == "assertion":
        assert value == 42
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_first_failure_is_told_with_its_values() -> None:
    with pytest.raises(launch.RankFailed) as raised:
        launch.results(launch.outcomes_of(2, fails_on_one, "assertion", fresh=True, grace=0.2))
    told = str(raised.value)
    assert told.startswith("rank 1: AssertionError: ")
    assert "assert value == 42" in told and "value = 41" in told


def test_a_rank_that_dies_and_one_that_is_late() -> None:
    outcomes = launch.outcomes_of(2, fails_on_one, "kill", fresh=True, seconds=5)
    assert [outcome.error for outcome in outcomes] == [
        "outlived its deadline",
        "died with code -9",
    ]


def write_pid_and_sleep(directory: Path) -> None:
    Path(directory, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(60)


def test_ranks_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from tests.ranks import launch; from tests.unit import test_launch\n"
        "launch.run(2, test_launch.write_pid_and_sleep, pathlib.Path(sys.argv[1]), fresh=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=launch.ROOT) as caller:
        try:
            pids = _soon(lambda: [int(path.read_text() or 0) for path in tmp_path.iterdir()], 2)
        finally:
            caller.kill()
    _soon(lambda: [pid for pid in pids if not _runs(pid)], 2)


def _soon(find: Callable[[], list[int]], length: int) -> list[int]:
    """Return what `find` finds when it is `length` long; raises AssertionError after a minute."""
    for _ in range(600):
        if len(found := find()) == length and all(found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{found} after a minute")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
