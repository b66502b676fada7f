"""Each test has exactly one tier: the room, which is the folder, that it is in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tools.install import memory

_HOST = re.compile(r"(?:vllm|ascend)-\d[\d.]*\d")
ROOMS = ("unit", "ranks", "hosts", "graphs", "engines", "faults", "docs")
BYTES_PER_WORKER = 6 << 30
"""Two ranks with an imported vLLM each, and the process that they are forked from."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer `-n auto` from the cores and the memory, of the container if there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, memory() // BYTES_PER_WORKER))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        if room not in ROOMS:
            raise pytest.UsageError(
                f"{item.nodeid} is in no room; accepted are {', '.join(ROOMS)}: move it into one."
            )
        second = sorted({mark.name for mark in item.iter_markers()} & {*ROOMS})
        if second:
            raise pytest.UsageError(
                f"{item.nodeid} has the tier marker {', '.join(second)}, but its tier is its room "
                f"{room}: remove the marker."
            )
        item.add_marker(room)
        if room == "engines":
            item.add_marker("alone")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let a worker run whole groups of tests: those of a file, and in a file those of a host.

    The tests of a group share what takes long to start; those of `faults` share nothing.
    xdist 3.8 marks groups in a way that pytest 9.2 does not see.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if Path(file).parent.name == "faults":
                return nodeid
            host = _HOST.search(test)
            return f"{file} {host[0]}" if host else file

    return Groups(config, log)
