"""vllm-ascend's real packages on a CPU: sharded layers, idle ranks, quantization.

Each test runs two real ranks over gloo in children with that release's overlays. What of the
NPU is stood in for is listed in `tests/bodies/ascend.py`; names of tests that stand in for
arithmetic kernels say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.bodies import ascend
from tests.hosts.overlay import Host, environment

RELEASES = ("0.13.0", "0.18.0", "0.23.0")
SECONDS = 240
# Rows by step and rank: a profile run, both working, one idle, the other idle, both idle.
PLAN = [[-6, -6], [3, 5], [4, 0], [0, 2], [0, 0]]
KINDS = ["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"]

Results = list[dict[str, Any]]


def on(*releases: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("host", [Host("ascend", r) for r in releases], ids=str)


def option(host: Host) -> dict[str, Any]:
    """vllm-ascend's own option, where this release reads it (0.9.1 has none)."""
    size = {"oproj_tensor_parallel_size": 2}
    return size if host.version in ("0.9.1", "0.11.0") else {"finegrained_tp_config": size}


def outcomes_of(
    host: Host, world: int, body: str, size: int | str, directory: Path, **args: Any
) -> list[ranks.Outcome]:
    arguments = {"model": ascend.write_model(directory / "model"), **args}
    env = {**environment(host, {}), "OPROJ_TENSOR_PARALLEL_SIZE": str(size)}
    return ranks.outcomes_of(
        world, f"tests.bodies.ascend:{body}", arguments, seconds=SECONDS, env=env
    )


def run(host: Host, body: str, size: int | str, directory: Path, **args: Any) -> Results:
    outcomes = outcomes_of(host, 2, body, size, directory, dp=2, **args)
    for outcome in outcomes:
        assert not outcome.error, f"rank {outcome.rank}: {outcome.error}\n{outcome.log[-4000:]}"
    return [outcome.result for outcome in outcomes]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Host], Results]:
    """Results by rank of one start of a release's processes, with the toggle `auto`."""

    @functools.cache
    def once(host: Host) -> Results:
        directory = tmp_path_factory.mktemp(str(host))
        return run(
            host,
            "host",
            "auto",
            directory,
            plan=PLAN,
            kinds=KINDS,
            additional_config=option(host),
        )

    return once


@on(*RELEASES)
def test_auto_serves_the_built_in_option_and_hides_it(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        assert result["option_seen_by_host"] in (None, 0)
        assert result["option_kept"] == option(host) | result["option_kept"]
        assert result["size"] == 2 and result["ranks"] == [0, 1] and result["layers"] == 2


@on(*RELEASES)
def test_model_with_idle_ranks_and_profile_run(host: Host, seen: Callable[[Host], Results]) -> None:
    """vllm-ascend's DeepSeek: constructed, loaded, run; the kernels inside attention stood in."""
    for result in seen(host):
        steps = result["steps"]
        assert steps["shapes"] == [[64, 128]] * 2
        assert steps["exact"] == [True, True]
        assert steps["exchanges"] == len(PLAN) * result["layers"]
        for error, scale in zip(steps["errors"], steps["scales"], strict=True):
            assert error <= 5e-6 * scale


@on(*RELEASES)
def test_w8a8_static_with_a_stand_in_for_npu_quant_matmul(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        layer = result["W8A8"]
        assert layer["method"] == "AscendW8A8LinearMethod"
        assert layer["shapes"]["weight"] == [32, 128]
        assert all(layer["exact"].values()), layer["exact"]
        # Integers are exact; what differs is the rounding of two bfloat16 partial results.
        assert layer["error"] <= 8e-3 * layer["scale"]


@on(*RELEASES)
def test_w8a8_dynamic_with_stand_ins_for_npu_dynamic_quant_and_npu_quant_matmul(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        layer = result["W8A8_DYNAMIC"]
        assert layer["method"] == "AscendW8A8DynamicLinearMethod"
        assert layer["shapes"]["weight"] == [32, 128]
        assert all(layer["exact"].values()), layer["exact"]
        # Each rank scales its own part of a row, as under ordinary tensor parallelism.
        assert layer["error"] <= 2e-2 * layer["scale"]


@on(*RELEASES)
def test_w4a8_with_a_stand_in_for_npu_weight_quant_batchmatmul(
    host: Host, seen: Callable[[Host], Results]
) -> None:
    for result in seen(host):
        layer = result["W4A8_DYNAMIC"]
        assert layer["method"] == "AscendW4A8DynamicLinearMethod"
        assert layer["shapes"]["weight"] == [32, 128]
        assert layer["shapes"]["weight_scale_second"] == [32, 4]
        assert all(layer["exact"].values()), layer["exact"]
        assert layer["error"] <= 8e-3 * layer["scale"]


@on(*RELEASES)
def test_a_number_beside_the_built_in_option_is_refused(host: Host, tmp_path: Path) -> None:
    given = {"additional_config": option(host)}
    (outcome,) = outcomes_of(host, 1, "configuration", 4, tmp_path, **given)
    assert "OPROJ016" in outcome.error, outcome.log[-4000:]
    assert "OPROJ_TENSOR_PARALLEL_SIZE is 4" in outcome.error
    assert "oproj_tensor_parallel_size is 2" in outcome.error
