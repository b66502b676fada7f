from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.ranks import launch

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[launch.World]:
    """Ranks that stay for the tests of a module, as many as the parameter says (default 2)."""
    with launch.World(getattr(request, "param", 2)) as ranks:
        yield ranks
