"""Each test has exactly one tier: the room, which is the folder, that it is in.

With `-n 2 --dist loadgroup` one worker runs a file from its start to its end, because its tests
share what takes long to start. Of the graphs it runs one host.
"""

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
        item.add_marker(pytest.mark.xdist_group(_group(item, room)))


def _group(item: pytest.Item, room: str) -> str:
    callspec = getattr(item, "callspec", None)
    host = callspec.params.get("host") if callspec is not None and room == "graphs" else None
    return f"{room}/{item.path.name} {host or ''}".strip()
