"""Each test has exactly one tier: the room, which is the folder, that it is in.

With `-n auto --dist loadgroup` one worker runs a file from its start to its end, because its tests
share what takes long to start. Of the graphs it runs one host.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOMS = ("unit", "ranks", "hosts", "graphs", "engines", "faults", "docs")


BYTES_PER_WORKER = 6 << 30
"""Two ranks with an imported vLLM each, and the process that they are forked from."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer `-n auto` from the cores and the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // BYTES_PER_WORKER))


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
        item.add_marker(pytest.mark.xdist_group(_group(item, room)))


def _group(item: pytest.Item, room: str) -> str:
    callspec = getattr(item, "callspec", None)
    host = callspec.params.get("host") if callspec is not None and room == "graphs" else None
    return f"{room}/{item.path.name} {host or ''}".strip()
