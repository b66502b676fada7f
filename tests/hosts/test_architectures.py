"""The table of architectures: every row that can be constructed here, and the newest release."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oproj_patch.releases import VLLM_RELEASES
from tests.docs.architectures import CONSTRUCTED, rows
from tests.ranks.launch import World
from tests.ranks.registry import Source
from tests.ranks.test_architectures import SAMPLE, check

from .wheels import Host, ensure, origin

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    with World(2) as world:
        yield world


@pytest.mark.parametrize("architecture", sorted(CONSTRUCTED.keys() - {*SAMPLE}))
def test_every_attention_is_sharded(ranks: World, architecture: str) -> None:
    check(ranks, architecture)


def test_every_architecture_of_the_newest_release_has_one_row() -> None:
    package = origin("vllm", ensure(Host("vllm", VLLM_RELEASES[-1])))
    assert sorted(rows()) == sorted(Source(package).expert_architectures())
