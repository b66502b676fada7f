"""Who captures and replays what, decided by each release's own model runner; two ranks on gloo.

A process for each release runs all modes; every test looks at one mode and scenario of it. A
release whose deciding code is its predecessor's runs in its default mode only. With
`OPROJ_TEST_GRAPHS=default` so does every release but those of `IN_FULL`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from oproj_patch.releases import ASCEND_RELEASES, in_range
from tests.hosts.wheels import HOSTS, INSTALLED, Host, ensure, environment, origin

from .drive import DRAFTED, HIDDEN, LAYERS, TOLERANCE, Step, Told, passed

SECONDS = 1200
ROOT = Path(__file__).resolve().parents[2]
# Releases that decide about graphs as their predecessors do (a test compares their code).
AS_BEFORE = {
    "vllm": ("0.10.0", "0.10.2", "0.23.0", "0.26.0", "0.27.1", "0.29.0", "0.33.0"),
    "ascend": ("0.23.0.post1",),
}
IN_FULL = {
    "vllm": ("0.9.1", "0.11.0", "0.18.0", "0.25.1", INSTALLED),
    "ascend": ("0.9.1", "0.11.0", "0.13.0", "0.18.0", "0.23.0", list(ASCEND_RELEASES)[-1]),
}
NEWEST = Host("vllm", INSTALLED), Host("ascend", list(ASCEND_RELEASES)[-1])
DEFAULT_ONLY = os.environ.get("OPROJ_TEST_GRAPHS") == "default"
MODES = ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE", "FULL")
# Captured are 1, 2, 4, 8 and 24 rows; a gather moves fewer bytes from 16 equal rows on, and begins
# above 24.
PLANS: dict[str, Sequence[Step]] = {
    "all busy": [[[1, 1, 1], [1]], [[1] * 8, [1, 1]], [[5], [7]], [[1] * 5, [1] * 7]],
    "one idle": [[[1, 1, 1], []], [[], [1]], [[20], []], [[40], []]],
    "one prefilling": [[[7], [1, 1]], [[1], [3, 1]], [[20], [1]]],
    "straddling": [[[1] * 8, [1] * 9], [[24], [25]], [[40], [18, 1]], [[60], [50]]],
    "gathered": [[[20], [17]], [[30], [28]], [[24], [24]], [[1] * 18, [17]], [[20], [1] * 20]],
    "zero tokens": [[[1, 1], None], [None, [7]], [None, [1, 1]]],
    "drafter": [
        [[DRAFTED, DRAFTED], [DRAFTED]],
        [[DRAFTED], [1, 1, 1]],
        [[DRAFTED], []],
        [[7], [DRAFTED] * 3],
        [[], [1, DRAFTED]],
    ],
}


def modes(host: Host) -> Sequence[str]:
    """The graph modes that a host has."""
    return MODES if in_range(host.vllm, "0.11") else ("NONE", "PIECEWISE", "FULL")


def default(host: Host) -> str:
    """The mode that a host takes when none is asked for."""
    both = in_range(host.version, "0.11" if host.kind == "vllm" else "0.23")
    return "FULL_AND_PIECEWISE" if both else "PIECEWISE"


def wanted(host: Host) -> dict[str, dict[str, Sequence[Step]]]:
    """Mode -> scenario -> steps: what is run of a host."""
    skipped = DEFAULT_ONLY and host.version not in IN_FULL[host.kind]
    if skipped or host.version in AS_BEFORE[host.kind]:
        return {default(host): {name: PLANS[name] for name in ("one idle", "one prefilling")}}
    return {mode: PLANS for mode in modes(host)}


@functools.cache
def run(host: Host) -> tuple[dict[str, dict[str, list[Told]]], str]:
    """What both ranks told of every mode and scenario of one host; the end of what it printed."""
    runs: dict[str, Any] = {}
    for mode, plans in wanted(host).items():
        runs[mode] = {"mode": mode, "plans": {**plans}}
        if plan := runs[mode]["plans"].pop("drafter", None):
            runs[f"{mode} drafter"] = {"mode": mode, "plans": {"drafter": plan}, "drafting": True}
    for mode in wanted(host).keys() & {mode for release, mode in REFUSED if release == str(host)}:
        runs[f"{mode} all the same"] = {"mode": mode, "plans": WHY, "refusing": False}
    if host in NEWEST:
        runs["1x2"] = {"mode": default(host), "plans": ON_GRID, "grid": "1x2"}
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
            answers, printed = process.communicate(json.dumps([*runs.values()]), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            answers, printed = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    told = map(json.loads, answers.splitlines())
    return dict(zip(runs, told, strict=False)), printed


class Refused(NamedTuple):
    """What the package says of a mode at the start, and how the two ranks end without that."""

    sentence: str
    ends: tuple[str, str]


REFUSED = {  # (release, mode)
    ("ascend-0.11.0", "FULL_DECODE_ONLY"): Refused(
        "ranks do not agree on a full graph there", (" replay\n", "across_group")
    ),
    ("vllm-0.12.0", "FULL_DECODE_ONLY"): Refused(
        "its runner asserts that no rank decodes while another",
        ("assert batch_descriptor.num_tokens == num_tokens_padded", "did not arrive"),
    ),
}
ON_GRID = {name: PLANS[name] for name in ("all busy", "one idle", "straddling", "gathered")}
WHY = {name: PLANS[name] for name in ("one idle", "one prefilling")}
# Releases that end by an assertion of their own, with the shim and without it, in FULL with drafts
# of one token: they capture an odd number of rows then, and an idle rank's row is padded to it.
ASSERTING = ("0.12.0", "0.13.0", "0.14.1", "0.15.1", "0.16.0", "0.17.1")
ASSERTION = "assert num_tokens_padded % uniform_decode_query_len == 0"
# It replays a full graph only in a pass without drafted rows.
EAGER = {("ascend-0.9.1", "FULL drafter")}
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
    for mode, plans in wanted(host).items()
    for scenario in plans
]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(("host", "mode", "scenario"), CELLS)
def test_cell(host: Host, mode: str, scenario: str) -> None:
    """Both ranks finish, and every request's output is that of whole weights in float64.

    Or both refuse the mode at the start.
    """
    told_by_run, printed = run(host)
    name = f"{mode} drafter" if scenario == "drafter" else mode
    assert name in told_by_run, printed[-3000:]
    ranks = told_by_run[name][scenario]
    refusal = REFUSED.get((str(host), mode))
    if refusal is not None:
        assert all(refusal.sentence in told.get("error", "") for told in ranks)
        return
    if (host.kind, mode, scenario) == ("vllm", "FULL", "drafter") and host.version in ASSERTING:
        assert any(ASSERTION in told.get("error", "") for told in ranks)
        return
    right(ranks, scenario)
    graphs = mode != "NONE" and (str(host), mode) not in WITHOUT_GRAPHS
    for told in ranks:
        assert (told["captures"] > 0) == graphs
    if graphs and scenario in ("all busy", "drafter") and (str(host), name) not in EAGER:
        assert any(sum(told["replays"]) for told in ranks)


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("host", NEWEST, ids=str)
def test_output_cut(host: Host) -> None:
    """The same in the default mode, where each rank has half of the outputs."""
    told_by_run, printed = run(host)
    assert "1x2" in told_by_run, printed[-3000:]
    for scenario in ON_GRID:
        ranks = told_by_run["1x2"][scenario]
        right(ranks, scenario)
        assert all(told["captures"] > 0 for told in ranks)


def right(ranks: Sequence[Told], scenario: str) -> None:
    """Both ranks finished, and every request's output is that of whole weights in float64."""
    for rank, told in enumerate(ranks):
        assert "hung" not in told, f"rank {rank} hung in {told['hung'][:3]}, peers: {_ends(ranks)}"
        assert "error" not in told, told["error"]
        assert len(told["errors"]) == len(PLANS[scenario])
        for step, error in zip(PLANS[scenario], told["errors"], strict=True):
            assert (error is None) == (not step[rank])
            assert error is None or error < TOLERANCE


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    ("host", "mode"),
    [pytest.param(host, mode, id=f"{host}-{mode}") for host in HOSTS for release, mode in REFUSED
     if release == str(host)],
)  # fmt: skip
def test_why_a_mode_is_refused(host: Host, mode: str) -> None:
    """Where it is not refused, one rank replays a graph while the other does not, and both end."""
    told_by_mode, printed = run(host)
    if mode not in wanted(host):
        pytest.skip(f"{mode} is not run here")
    assert f"{mode} all the same" in told_by_mode, printed[-3000:]
    ends = [
        ["\n".join([*told.get("hung", ()), told.get("error", "")]) for told in ranks]
        for ranks in told_by_mode[f"{mode} all the same"].values()
        if not all(map(passed, ranks))
    ]
    one, other = REFUSED[str(host), mode].ends
    assert any(
        (one in first and other in second) or (one in second and other in first)
        for first, second in ends
    ), ends


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("host", NEWEST, ids=str)
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


# Where a release decides who captures and replays what: package -> file -> functions and variables;
# (): all functions.
DECIDING: Mapping[str, Mapping[str, Sequence[str]]] = {
    "vllm": {
        "v1/cudagraph_dispatcher.py": (),
        "v1/worker/dp_utils.py": (),
        "v1/worker/gpu_model_runner.py": (
            "get_dp_padding",
            "_determine_batch_execution_and_padding",
            "skip_cuda_graphs",
        ),
        "v1/worker/gpu_worker.py": ("execute_dummy_batch",),
        "forward_context.py": ("make", "num_tokens_across_dp"),
        "compilation/cuda_graph.py": ("__call__",),
    },
    "vllm_ascend": {
        "worker/model_runner_v1.py": (
            "_sync_metadata_across_dp",
            "_determine_batch_execution_and_padding",
        ),
        "worker/worker.py": ("execute_dummy_batch",),
        "utils.py": ("should_skip_allreduce_across_dp_group",),
        "spec_decode/llm_base_proposer.py": (),
    },
}


@pytest.mark.parametrize("kind", AS_BEFORE)
def test_a_release_whose_deciding_code_changed_is_run_in_full(kind: str) -> None:
    hosts = [host for host in HOSTS if host.kind == kind]
    decided = list(map(deciding, hosts))
    same = [
        host.version
        for host, before, now in zip(hosts[1:], decided, decided[1:], strict=False)
        if before == now
    ]
    assert same == list(AS_BEFORE[kind])


def deciding(host: Host) -> dict[str, str]:
    """Return what `DECIDING` names in a release, without comments and docstrings."""
    found = {}
    module = {"vllm": "vllm", "ascend": "vllm_ascend"}[host.kind]
    package = origin(module, ensure(host))
    for file, names in DECIDING[module].items():
        path = package / file
        for node in ast.walk(ast.parse(path.read_text() if path.exists() else "")):
            if isinstance(node, ast.FunctionDef):
                name = node.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
            else:
                continue
            if name in names or (not names and isinstance(node, ast.FunctionDef)):
                if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                    del node.body[0]
                found[f"{file}: {name}"] = ast.dump(node)
    return found


def outcome(host: Host, mode: str) -> str:
    """Return what `test_cell` shows of a mode of a host, for the table in the documents."""
    if mode not in modes(host):
        return "not in it"
    if (str(host), mode) in REFUSED:
        return "refused"
    if host.version in AS_BEFORE[host.kind] and mode != default(host):
        return "as the one before"
    return "no graphs" if (str(host), mode) in WITHOUT_GRAPHS else "right"
