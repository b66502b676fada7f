"""Every sharded row of the table of architectures that can be constructed here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.architectures import CONSTRUCTED
from tests.ranks.launch import World
from tests.ranks.test_architectures import SAMPLE, check

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    with World(2) as world:
        yield world


@pytest.mark.parametrize("architecture", sorted(CONSTRUCTED.keys() - {*SAMPLE}))
def test_every_attention_is_sharded(ranks: World, architecture: str) -> None:
    check(ranks, architecture)
