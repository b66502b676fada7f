"""vllm-ascend's own option and ours: one parser, one size, or one sentence."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from oproj_patch.errors import OprojError
from oproj_patch.hosts import ascend_option
from oproj_patch.hosts.ascend_option import resolved
from oproj_patch.settings import Settings

KEY = ascend_option.KEY


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({}, 0),
        (None, 0),
        ({KEY: 0}, 0),
        ({KEY: 4}, 4),
        ({"finegrained_tp_config": {KEY: 8}}, 8),
        ({KEY: 0, "finegrained_tp_config": {KEY: 4}}, 4),  # 0 at the top level is "not set"
        ({KEY: 4, "finegrained_tp_config": {KEY: 4}}, 4),
    ],
    ids=str,
)
def test_size(config: Any, size: int) -> None:
    if size:
        resolved_size = resolved(
            Settings(auto=True), SimpleNamespace(additional_config=config)
        ).size
        assert resolved_size == size
    found = [holder[KEY] for holder, _ in ascend_option.configured(config)]
    assert set(found) == ({size} if size else set())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({KEY: "4"}, f"--additional-config names {KEY} = '4'; accepted"),
        ({KEY: [4]}, f"--additional-config names {KEY} = [4]; accepted"),
        ({KEY: 1}, f"--additional-config names {KEY} = 1; accepted"),
        (
            {KEY: 4, "finegrained_tp_config": {KEY: 8}},
            f"{KEY} = 4 and finegrained_tp_config.{KEY} = 8",
        ),
        ({KEY: 4, "oproj_patch": {"size": 8}}, f"{KEY} = 4 and oproj_patch.size = 8"),
        ({}, "--additional-config names no size"),
    ],
    ids=str,
)
def test_auto_refused(config: Any, words: str) -> None:
    with pytest.raises(OprojError) as raised:
        resolved(Settings(auto=True), SimpleNamespace(additional_config=config))
    assert raised.value.code == "OPROJ017" and words in str(raised.value)


def test_auto_resolved() -> None:
    for config in ({KEY: 4}, {"oproj_patch": {"size": 4}}, {KEY: 4, "oproj_patch": {"size": 4}}):
        found = resolved(Settings(auto=True), SimpleNamespace(additional_config=config))
        assert (found.size, found.auto) == (4, True)


@pytest.mark.parametrize("version", ["0.26.0rc1", "0.27.1rc1", "0.30.0rc2"])
def test_out_of_sight_and_back(version: str) -> None:
    """Up to 0.26 the constructor reads the options of a VllmConfig, then its own arguments."""
    nested = {KEY: 4, "mlp": 2}
    config = {"finegrained_tp_config": nested, "oproj_patch": {"size": 4}, "refresh": True}
    kept = copy.deepcopy(config)
    vllm_config = SimpleNamespace(additional_config=config)
    seen: list[Any] = []

    def constructor(vllm_config: Any = None, **fields: Any) -> None:
        seen.append(copy.deepcopy(vllm_config.additional_config if vllm_config else fields))

    given: Any = {"vllm_config": vllm_config} if version == "0.26.0rc1" else config
    seam = ascend_option.seam(Settings(auto=True), version)
    seam.wrapper(constructor, None, (), given)
    assert seen == [{"finegrained_tp_config": {"mlp": 2}, "refresh": True}]
    assert config == kept and config["finegrained_tp_config"] is nested
    wrapper = ascend_option.seam(Settings(size=2), version).wrapper
    with pytest.raises(OprojError, match=r"^OPROJ016: "):
        wrapper(constructor, None, (), given)
    assert len(seen) == 1
