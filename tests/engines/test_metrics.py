"""A server's metrics end point shows its workers."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from demo import model as demo_model
from demo.engines import EngineConfig, serve

pytest.importorskip("vllm")
parser = pytest.importorskip("prometheus_client.parser")

SIZE = {"OPROJ_TENSOR_PARALLEL_SIZE": "2"}


def test_a_real_server_shows_its_workers_on_metrics(tmp_path: Path) -> None:
    config = EngineConfig(
        model=demo_model.ensure("dense", trained=False),
        env={**SIZE, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )
    question = json.dumps({"model": "demo", "prompt": "The light", "max_tokens": 2}).encode()
    with serve(config) as server:
        # Workers publish before their first step.
        asked = urllib.request.Request(
            f"{server.base_url}/v1/completions", question, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 2
        with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as got:
            page = got.read().decode()
    shown = {
        (sample.name, sample.labels["rank"]): sample.value
        for family in parser.text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("oproj_patch_") and not sample.name.endswith("_created")
    }
    half = demo_model.O_PROJ_BYTES // 2
    for rank in ("0", "1"):
        assert shown["oproj_patch_group_size", rank] == 2
        assert shown["oproj_patch_layers", rank] == demo_model.NUM_LAYERS
        assert shown["oproj_patch_kept_bytes", rank] == half
        assert shown["oproj_patch_saved_bytes", rank] == half
    assert len(shown) == 2 * 4
