"""Ten times over: engines in one process; weights reloaded, and sleep, in a server."""

from __future__ import annotations

import json
import os
import resource
import signal
import urllib.request
from pathlib import Path

from demo import engines
from demo import model as demo_model
from tests import ranks
from tests.faults import engine

TIMES = 10
MIB = 1 << 20


def test_engines_come_and_go() -> None:
    config = engines.EngineConfig(demo_model.ensure("dense", trained=False), extension=None)
    first = engines.free_port(run=20 * TIMES)
    env = {
        **engine.ON,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    told = ranks.run(
        2,
        "tests.faults.bodies:engines",
        {
            "options": config.engine_options(),
            # vLLM takes a port for each of its groups, from this one on.
            "dp_ports": list(range(first, first + 20 * TIMES, 20)),
        },
        env=env,
        seconds=420,
    )
    for lives in told:
        for life in lives:
            print(life)
            assert life["layers"] == demo_model.NUM_LAYERS and life["exchanges"] > 0
            assert life["tokens"] == lives[0]["tokens"]
            assert (life["ranks"], life["groups"], life["objects"]) == ([], 0, 0)
        for what in ("files", "threads"):
            assert lives[-1][what] <= max(life[what] for life in lives[:2]), what
        sizes = [life["rss"] for life in lives]
        assert max(sizes[TIMES // 2 :]) - max(sizes[: TIMES // 2]) < 8 * MIB


def test_a_running_server_reloads_its_weights_sleeps_and_ends() -> None:
    options = {"data_parallel_size": 2, "served_model_name": "demo"}
    # The development mode adds the end points.
    with engine.node(options, {**engine.ON, "VLLM_SERVER_DEV_MODE": "1"}) as server:
        engine.until_healthy(server, 180)
        told = [engine.complete(server.port, "demo", 16) for _ in range(4)]
        size = _resident(server)
        for _ in range(TIMES):
            _post(server, "collective_rpc", {"method": "reload_weights"})
        told += [engine.complete(server.port, "demo", 16) for _ in range(4)]
        # On a CPU vLLM frees nothing, but its ranks stop and start to run in lock step.
        for _ in range(TIMES):
            _post(server, "sleep?level=1")
            _post(server, "wake_up")
            told.append(engine.complete(server.port, "demo", 16))
        grown = _resident(server) - size
        print(f"{TIMES} reloads, {TIMES} sleeps: {grown / MIB:.1f} MiB more in all processes")
        assert len(set(told)) == 1 and grown < 100 * MIB
        assert server.log().count("o_proj sharded 2-way over ranks [0, 1]") == 2
        used = server.shared_memory()
        os.kill(server.process.pid, signal.SIGTERM)
        engine.leaves_nothing(server, used)


def _post(server: engine.Node, path: str, body: dict[str, str] | None = None) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/{path}",
        data=json.dumps(body or {}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read()


def _resident(server: engine.Node) -> int:
    """Resident bytes of every process of the server."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server.members()]
    return sum(pages) * resource.getpagesize()
