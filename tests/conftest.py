"""One process that has imported vLLM, for the tests that fork ranks from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm
