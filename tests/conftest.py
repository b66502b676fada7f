"""Each test has exactly one tier: the room, which is the folder, that it is in."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOMS = ("unit", "ranks", "hosts", "graphs", "engines", "faults", "docs")


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
