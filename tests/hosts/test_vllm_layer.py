"""The sharded layer on every vLLM release: real groups, layers and forward contexts, two ranks.

One start for each release runs all parts; every test looks at one part of what it told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from oproj_patch.releases import in_range, parse

from .. import ranks
from .conftest import SECONDS
from .overlay import HOSTS, OLDEST_WRAPT, Host, ensure, environment, origin

torch = pytest.importorskip("torch")

VLLM = [host for host in HOSTS if host.kind == "vllm"]
SIZE = 2
TOLERANCE = 5e-6
HALF = 256  # of the 512 input columns

Told = list[dict[str, Any]]
Run = tuple[Told, float]
"""What both ranks of one release told, by part; seconds."""


@pytest.fixture(scope="module", params=VLLM, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    found: Host = request.param
    return found


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Host, Future[Run]]]:
    """A run of each release that is wanted, two at a time; what they need is fetched meanwhile."""
    wanted = {
        item.callspec.params["host"]: None
        for item in request.session.items
        if item.path == request.path and isinstance(item, pytest.Function)
    }
    with ThreadPoolExecutor(1) as fetching, ThreadPoolExecutor(2) as running:
        for release in wanted:
            fetching.submit(ensure, release)
        started = {release: running.submit(run, release) for release in wanted}
        try:
            yield started
        finally:
            fetching.shutdown(cancel_futures=True)
            running.shutdown(cancel_futures=True)


def run(host: Host) -> Run:
    env = {
        "PYTHONPATH": environment(host)["PYTHONPATH"],
        "OPROJ_TENSOR_PARALLEL_SIZE": str(SIZE),
        "OPROJ_PATCH_DEBUG": "0",
    }
    started = time.monotonic()
    (told,) = ranks.run(1, "tests.bodies.host_layer:on_all_ranks", seconds=240, env=env)
    return list(told), time.monotonic() - started


@pytest.fixture(scope="module")
def told(host: Host, runs: dict[Host, Future[Run]]) -> Told:
    return runs[host].result()[0]


def part(told: Told, name: str) -> list[Any]:
    """One part of what each rank told; an assertion that fails where the rank or the part did."""
    for of_rank in told:
        assert "error" not in of_rank, of_rank["error"]
    parts = [of_rank[name] for of_rank in told]
    for found in parts:
        assert "error" not in found, found["error"]
    return parts


def test_release(
    host: Host,
    told: Told,
    runs: dict[Host, Future[Run]],
    record_property: Callable[[str, object], None],
) -> None:
    record_property(SECONDS, runs[host].result()[1])
    entries = ensure(host)
    for found in part(told, "release"):
        assert parse(found["version"]) == parse(host.version)
        assert (found["device"], found["torch"]) == ("cpu", torch.__file__)
        oldest = host.version == VLLM[0].version
        assert found["wrapt"] == (OLDEST_WRAPT if oldest else metadata.version("wrapt"))
        for module, file in found["files"].items():
            assert Path(file).is_relative_to(origin(module, entries)), module


def test_construct(told: Told) -> None:
    for rank, found in enumerate(part(told, "construct")):
        assert set(found) == {"DeepseekV2MLAAttention", "DeepseekV2Attention"}
        for name, attention in found.items():
            error = attention.pop("error")
            assert attention == {
                "class": name,
                "sharded": True,
                "named": True,
                "counted": True,
                "cut": [rank * HALF],
            }
            assert error < TOLERANCE


def test_load(told: Told) -> None:
    for rank, found in enumerate(part(told, "loads")):
        assert found == {
            "of the parameter": [rank * HALF],
            "weight_loader": [rank * HALF],
            "weight_loader_v2": [rank * HALF],
            "bias whole": True,
        }


def test_forward_eager(told: Told) -> None:
    _equal(part(told, "eager"))


def test_idle_rank(told: Told) -> None:
    _equal(part(told, "idle"))


def test_forward_compiled(told: Told) -> None:
    parts = part(told, "compiled")
    _equal(parts)
    assert [found["graphs"] for found in parts] == [1] * SIZE


def _equal(parts: list[Any]) -> None:
    for found in parts:
        assert len(found["errors"]) == found["exchanges"] == 4
        assert max(found["errors"]) < TOLERANCE


def test_quantized(host: Host, told: Told) -> None:
    for found in part(told, "quantized"):
        for name, parameters in found.items():
            assert "error" not in parameters, parameters["error"]
            assert all(same for _, same in parameters.values()), (name, parameters)
        shapes = {name: {key: s for key, (s, _) in p.items()} for name, p in found.items()}
        if shapes["fp8 block"] or not in_range(host.version, "0.19"):
            assert shapes["fp8 block"] == {"weight": [256, 256], "weight_scale_inv": [2, 2]}
        assert shapes["W8A8"] == {"weight": [256, 256], "weight_scale": [256, 1]}
        assert shapes["AWQ"] == {"qweight": [256, 32], "qzeros": [4, 32], "scales": [4, 256]}
        assert shapes["GPTQ"].pop("g_idx", [256]) == [256]
        assert shapes["GPTQ"] == {"qweight": [32, 256], "qzeros": [4, 32], "scales": [4, 256]}


def test_row_counts(host: Host, told: Told) -> None:
    """True counts from the release's own metadata; before 0.11 the ranks agree by themselves."""
    announces = in_range(host.version, "0.11")
    for found in part(told, "row_counts"):
        for counts, announced in [*found["told"], found["own"]]:
            assert announced == (counts if announces else None)


def test_drafter(host: Host, told: Told) -> None:
    """Whole before 0.25, where a rank may skip its drafter: then nobody waits for it."""
    sharded = in_range(host.version, "0.25")
    for found in part(told, "drafter"):
        assert found["model"] == [True, [64, HALF]]
        assert found["draft"] == [sharded, [64, HALF if sharded else 2 * HALF]]
        assert found["exchanges"] == sharded
        assert found["difference"] < TOLERANCE


def test_seams_and_groups(told: Told) -> None:
    for found in part(told, "seams"):
        assert len(found["declared"]) == 6
        assert found["installed"] == found["wrapped"] == found["declared"]
        assert found["left"] == []
        assert found["ranks"] == [[0, 1], []]
        before, after = found["groups"]
        assert before == after
