"""Who captures and replays what, decided by each release's own model runner; two ranks on gloo.

A process for each release runs all modes; every test looks at one mode and scenario of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from oproj_patch.releases import in_range
from tests.hosts.wheels import Host, environment

from .drive import HIDDEN, LAYERS, TOLERANCE, Step, Told

SECONDS = 1200
ROOT = Path(__file__).resolve().parents[2]
# Missing: 0.9.2 and 0.10.0, whose runner cannot prepare a step without attention metadata.
RELEASES = (
    *("0.9.1", "0.10.1.1", "0.10.2", "0.11.0", "0.11.2", "0.12.0"),
    *("0.13.0", "0.18.0", "0.23.0", "0.32.0"),
)
ASCEND = ("0.11.0", "0.13.0", "0.18.0", "0.23.0")
HOSTS = (
    *(Host("vllm", release) for release in RELEASES),
    *(Host("ascend", release) for release in ASCEND),
)
MODES = ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE", "FULL")
# Captured are 1, 2, 4, 8 and 24 rows; a gather moves fewer bytes from 16 equal rows on, and begins
# above 24.
PLANS: dict[str, Sequence[Step]] = {
    "all busy": [[[1, 1, 1], [1]], [[1] * 8, [1, 1]], [[5], [7]]],
    "one idle": [[[1, 1, 1], []], [[], [1]], [[20], []], [[40], []]],
    "one prefilling": [[[7], [1, 1]], [[1], [3, 1]], [[20], [1]]],
    "straddling": [[[1] * 8, [1] * 9], [[24], [25]], [[40], [18, 1]], [[60], [50]]],
    "gathered": [[[20], [17]], [[30], [28]], [[24], [24]], [[1] * 18, [17]], [[20], [1] * 20]],
    "zero tokens": [[[1, 1], None], [None, [7]], [None, [1, 1]]],
}


def modes(release: str) -> Sequence[str]:
    """The graph modes that a release has."""
    if in_range(release, "0.10.1"):
        return MODES if in_range(release, "0.11") else ("NONE", "PIECEWISE", "FULL")
    return ("NONE", "PIECEWISE", "FULL")


@functools.cache
def run(host: Host) -> tuple[dict[str, dict[str, list[Told]]], str]:
    """What both ranks told of every mode and scenario of one host; the end of what it printed."""
    names = modes(host.vllm)
    wanted = [{"mode": mode, "plans": PLANS} for mode in names]
    env = environment(host) | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "OPROJ_TENSOR_PARALLEL_SIZE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_V1": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.graphs.drive"],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            answers, printed = process.communicate(json.dumps(wanted), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            answers, printed = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    told = map(json.loads, answers.splitlines())
    return dict(zip(names, told, strict=False)), printed


# Modes that the package refuses at the start: (release, mode): what it says.
REFUSED = {
    ("ascend-0.11.0", "FULL_DECODE_ONLY"): "ranks do not agree on a full graph there",
    ("vllm-0.12.0", "FULL_DECODE_ONLY"): "its runner asserts that no rank decodes while another",
}
# Modes that the release itself turns into NONE.
WITHOUT_GRAPHS = {("ascend-0.11.0", "FULL")}


CELLS = [
    pytest.param(
        host,
        mode,
        scenario,
        id=f"{host}-{mode}-{scenario.replace(' ', '-')}",
    )
    for host in HOSTS
    for mode in modes(host.vllm)
    for scenario in PLANS
]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(("host", "mode", "scenario"), CELLS)
def test_cell(host: Host, mode: str, scenario: str) -> None:
    """Both ranks finish, and every request's output is that of whole weights in float64.

    Or both refuse the mode at the start.
    """
    told_by_mode, printed = run(host)
    assert mode in told_by_mode, printed[-3000:]
    ranks = told_by_mode[mode][scenario]
    refusal = REFUSED.get((str(host), mode))
    if refusal is not None:
        assert all(refusal in told.get("error", "") for told in ranks)
        return
    for rank, told in enumerate(ranks):
        assert "hung" not in told, f"rank {rank} hung in {told['hung'][:3]}, peers: {_ends(ranks)}"
        assert "error" not in told, told["error"]
        assert len(told["errors"]) == len(PLANS[scenario])
        for step, error in zip(PLANS[scenario], told["errors"], strict=True):
            assert (error is None) == (not step[rank])
            assert error is None or error < TOLERANCE
        graphs = mode != "NONE" and (str(host), mode) not in WITHOUT_GRAPHS
        assert (told["captures"] > 0) == graphs


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("host", [HOSTS[len(RELEASES) - 1], HOSTS[-1]], ids=str)
def test_allocations_within_a_capture(host: Host) -> None:
    """In a captured forward pass the package allocates each layer's output, and nothing else.

    The GEMM's result is the host's allocation. The graph has 24 rows of float32.
    """
    told_by_mode, printed = run(host)
    assert "FULL" in told_by_mode, printed[-3000:]
    for told in told_by_mode["FULL"]["all busy"]:
        assert [size for size, *_ in told["allocations"]] == [24 * HIDDEN * 4] * LAYERS


def _ends(ranks: Sequence[Told]) -> list[Any]:
    return [told.get("hung", [told.get("error", "done")])[:2] for told in ranks]
