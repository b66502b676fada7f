"""Ten times over: engines' groups in one process, and weights reloaded in a running server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from oproj_patch.cli import demo_model, engines
from tests import ranks
from tests.faults import engine

TIMES = 10
MIB = 1 << 20


def test_groups_and_layers_come_and_go() -> None:
    ports = [ranks.free_port() for _ in range(TIMES)]
    left = ranks.run(2, "tests.faults.bodies:restart", {"ports": ports}, env=engine.ON, seconds=150)
    for rank in left:
        print(rank)
        assert rank["groups"] == [0] * TIMES
        assert rank["objects"] == [0] * TIMES
        assert rank["rss"][-1] - rank["rss"][2] < 4 * MIB


def test_weights_are_reloaded_in_a_running_server() -> None:
    config = engines.EngineConfig(demo_model.ensure("dense", trained=False), env=engine.ON)
    with engines.serve(config, deadline=240) as server:
        port = int(server.base_url.rpartition(":")[2])
        before = [engine.complete(port, "demo", 16) for _ in range(4)]
        size = _resident(server)
        for _ in range(TIMES):
            _rpc(server, "reload_weights")
        after = [engine.complete(port, "demo", 16) for _ in range(4)]
        grown = _resident(server) - size
        print(f"{TIMES} reloads: {grown / MIB:.1f} MiB more in all processes")
        assert before == after and len(set(after)) == 1
        assert all(worker["status"]["exchanges"] > 0 for worker in server.workers())
        assert grown < 100 * MIB


def _rpc(server: engines.Server, method: str) -> None:
    request = urllib.request.Request(
        f"{server.base_url}/collective_rpc",
        data=json.dumps({"method": method}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read()


def _resident(server: engines.Server) -> int:
    """Resident bytes of every process of the server."""
    total = 0
    for pid in engines._session_members(server._process._guard.pid):
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return total
