from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from .runs import EngineRuns

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engines)
            # Above the launcher's own deadlines, which end the engines and show their logs.
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> EngineRuns:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if sys.platform != "linux":
        pytest.skip("vLLM's CPU backend is tested on Linux")
    return EngineRuns(tmp_path_factory.mktemp)
