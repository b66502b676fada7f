from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import launch


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[launch.World]:
    """Ranks that stay for the tests of a module, as many as the parameter says (default 2)."""
    with launch.World(getattr(request, "param", 2)) as ranks:
        yield ranks
