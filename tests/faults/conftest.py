"""One process that has imported vLLM, for all tests of this directory that fork ranks from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.warm import Warm


@pytest.fixture(scope="package")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm
