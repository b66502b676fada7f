"""`--host vllm-0.11.0` runs one host's tests; the summary says how long each host took.

A test belongs to a host by its parameter `host`, an `wheels.Host` with its text as id.
"""

from __future__ import annotations

import re
from collections import defaultdict
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
SECONDS = "seconds_beside"
"""Property of one of a host's tests: seconds of what ran for that host beside its tests."""

_HOST = re.compile(r"\[(?:.*-)?((?:vllm|ascend)-[\w.]+)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--host", help="run the tests of this host only, such as ascend-0.13.0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--host")
    if wanted:
        others = [item for item in items if _host(item.nodeid) != wanted]
        items[:] = [item for item in items if _host(item.nodeid) == wanted]
        config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        (host, report)
        for of_outcome in terminalreporter.stats.values()
        for report in of_outcome
        if isinstance(report, pytest.TestReport) and (host := _host(report.nodeid))
    ]
    seconds: dict[str, float] = defaultdict(float)
    for host, report in reports:
        if report.when == "call":
            # Every part of a start has the seconds of all of it.
            beside = dict(report.user_properties).get(SECONDS, 0.0)
            seconds[host] = max(seconds[host], float(str(beside)))
    ran_beside = set(filter(seconds.get, seconds))
    for host, report in reports:
        if report.when == "call" or host not in ran_beside:  # else it waited for what ran beside
            seconds[host] += report.duration
    if seconds:
        terminalreporter.section("seconds per host, some at the same time")
        for name, taken in seconds.items():
            terminalreporter.write_line(f"{taken:8.1f}  {name}")
        terminalreporter.write_line(f"{sum(seconds.values()):8.1f}  all")


def _host(node: str) -> str | None:
    found = _HOST.search(node)
    return found[1] if found else None
