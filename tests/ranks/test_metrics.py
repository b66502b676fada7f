"""The worker's metrics as the API server's registry reads them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.ranks import launch
from tests.ranks.layers import finish, groups, made, whole

pytest.importorskip("prometheus_client")

SIZE = {launch.SIZE: "2"}


@pytest.mark.long
def test_every_worker_is_seen_through_the_multiprocess_registry(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry, multiprocess

    # The client looks for the directory when it is imported.
    env = {**SIZE, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    launch.run(2, exchanged, env=env, fresh=True)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    for rank in (0, 1):
        label = {"rank": str(rank), "grid": "2x1"}
        value = {
            name: registry.get_sample_value(f"oproj_patch_{name}", label)
            for name in ("group_size", "layers", "kept_bytes", "saved_bytes")
        }
        assert value == {
            "group_size": 2,
            "layers": 1,
            "kept_bytes": 20 * 24 * 4,
            "saved_bytes": 20 * 24 * 4,
        }


@pytest.mark.long
def test_nothing_is_written_where_nobody_could_see_it(tmp_path: Path) -> None:
    env = {**SIZE, "PROMETHEUS_MULTIPROC_DIR": "", "TMPDIR": str(tmp_path)}
    launch.run(2, exchanged, env=env, fresh=True)
    assert list(tmp_path.rglob("*.db")) == []


def exchanged() -> None:
    """In a rank: run two steps of one layer; the first sets the gauges."""
    from oproj_patch import status

    with groups(2):
        layer, _, _ = made(20, 48)
        finish(layer)
        before = threading.active_count()
        for _ in range(2):
            layer(whole(3, 48, torch.float32))
        told = status()
        assert (told.bytes_kept, told.bytes_saved, told.exchanges) == (1920, 1920, 2)
        assert threading.active_count() == before, "a thread was started"
