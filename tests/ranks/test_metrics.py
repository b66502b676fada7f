"""The worker's metrics as the API server's registry reads them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import launch
from tests.ranks.layers import finish, groups, made, whole

pytest.importorskip("prometheus_client")

SIZE = {launch.SIZE: "2"}


def test_every_worker_is_seen_through_the_multiprocess_registry(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry, multiprocess

    # The client looks for the directory when it is imported.
    env = {**SIZE, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    launch.run(2, exchanged, 7, True, env=env, fresh=True)
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


def test_nothing_is_started_where_nobody_could_see_it() -> None:
    env = {**SIZE, "PROMETHEUS_MULTIPROC_DIR": ""}
    launch.run(2, exchanged, 1, False, env=env, fresh=True)


def exchanged(times: int, published: bool) -> None:
    """In a rank: run `times` exchanges of one layer; `published` as long as there is a group."""
    from oproj_patch import metrics, status

    def publishing() -> bool:
        return "oproj_patch-metrics" in [thread.name for thread in threading.enumerate()]

    metrics.SECONDS = 0.05
    with groups(2):
        layer, _, _ = made(20, 48)
        finish(layer)
        for _ in range(times):
            layer(whole(3, 48, torch.float32))
        time.sleep(0.5)  # several periods of the publishing thread
        told = status()
        assert (told.bytes_kept, told.bytes_saved, told.exchanges) == (1920, 1920, times)
        assert publishing() is published
    deadline = time.monotonic() + 10
    while publishing():
        assert time.monotonic() < deadline, "the publishing thread outlives its group"
        time.sleep(0.02)
