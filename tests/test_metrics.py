"""The worker's metrics as the API server's registry reads them."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from demo import model as demo_model
from demo.engines import EngineConfig, serve

from . import ranks

pytest.importorskip("vllm")
parser = pytest.importorskip("prometheus_client.parser")

BODY = "tests.bodies.metrics:exchanged"
SIZE = {"OPROJ_TENSOR_PARALLEL_SIZE": "2"}
NO_GATHER = {"OPROJ_WEIGHT_GATHER_ROWS": "0"}


def test_every_worker_is_seen_through_the_multiprocess_registry(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry, multiprocess

    told = ranks.run(2, BODY, {"times": 7}, env={**SIZE, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    for rank in (0, 1):
        label = {"rank": str(rank)}
        value = {
            name: registry.get_sample_value(f"oproj_patch_{name}", label)
            for name in ("group_size", "layers", "kept_bytes", "saved_bytes")
        }
        for name in ("exchanges", "rows"):
            for scheme in ("exchange", "gather"):
                value[f"{name} {scheme}"] = registry.get_sample_value(
                    f"oproj_patch_{name}_total", {**label, "scheme": scheme}
                )
        assert value == {
            "group_size": 2,
            "layers": 1,
            "kept_bytes": 20 * 24 * 4,
            "saved_bytes": 20 * 24 * 4,
            "exchanges exchange": 7,
            "exchanges gather": 0,
            "rows exchange": 21,
            "rows gather": 0,
        }
        assert told[rank] == {
            "kept": 1920,
            "saved": 1920,
            "exchanges": 7,
            "publishing": True,
        }


def test_nothing_is_started_where_nobody_could_see_it() -> None:
    told = ranks.run(2, BODY, {"times": 1}, env={**SIZE, "PROMETHEUS_MULTIPROC_DIR": ""})
    assert [rank["publishing"] for rank in told] == [False, False]


@pytest.mark.engines
def test_a_real_server_shows_its_workers_on_metrics(tmp_path: Path) -> None:
    config = EngineConfig(
        model=demo_model.ensure("dense", trained=False),
        env={**SIZE, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )
    question = json.dumps({"model": "demo", "prompt": "The light", "max_tokens": 2}).encode()
    with serve(config) as server:
        # Workers begin to publish at their first exchange.
        asked = urllib.request.Request(
            f"{server.base_url}/v1/completions", question, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 2
        with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as got:
            page = got.read().decode()
    shown = {
        (sample.name, sample.labels["rank"], sample.labels.get("scheme")): sample.value
        for family in parser.text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("oproj_patch_") and not sample.name.endswith("_created")
    }
    half = demo_model.O_PROJ_BYTES // 2
    for rank in ("0", "1"):
        assert shown["oproj_patch_group_size", rank, None] == 2
        assert shown["oproj_patch_layers", rank, None] == demo_model.NUM_LAYERS
        assert shown["oproj_patch_kept_bytes", rank, None] == half
        assert shown["oproj_patch_saved_bytes", rank, None] == half
        assert ("oproj_patch_exchanges_total", rank, "exchange") in shown
