"""Ten times over: engines in one process; weights reloaded, and sleep, in a server."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from demo import engines
from demo import model as demo_model
from tests.faults import engine
from tests.ranks import launch

pytestmark = pytest.mark.alone

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
    # vLLM takes a port for each of its groups, from this one on.
    ports = list(range(first, first + 20 * TIMES, 20))
    told = launch.run(2, lives, config.engine_options(), ports, env=env, seconds=420)
    for of_rank in told:
        for life in of_rank:
            print(life)
            assert life["layers"] == demo_model.NUM_LAYERS and life["exchanges"] > 0
            assert life["tokens"] == of_rank[0]["tokens"]
            assert (life["ranks"], life["groups"], life["objects"]) == ((), 0, 0)
        for what in ("files", "threads"):
            assert of_rank[-1][what] <= max(life[what] for life in of_rank[:2]), what
        sizes = [life["rss"] for life in of_rank]
        assert max(sizes[TIMES // 2 :]) - max(sizes[: TIMES // 2]) < 8 * MIB


def lives(options: dict[str, Any], dp_ports: list[int]) -> list[dict[str, Any]]:
    """In a rank: start an engine in this process, use it, end it; once for each of `dp_ports`.

    options: of `vllm.LLM`; dp_ports: where the data-parallel ranks meet. Each time: its tokens,
    seconds, layers and exchanges; and what is left of it: `ranks` of the otp group, torch process
    `groups`, `objects` that are otp groups, `rss` in resident bytes, open `files`, `threads`.
    """
    import torch
    from vllm import LLM, SamplingParams

    import oproj_patch
    from oproj_patch.sharding import otp_group

    rank = os.environ["RANK"]
    # vLLM has a world of its own for the engines of each time.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(
        VLLM_DP_RANK=rank, VLLM_DP_RANK_LOCAL=rank, VLLM_DP_SIZE="2", VLLM_DP_MASTER_IP="127.0.0.1"
    )
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    told = []
    for port in dp_ports:
        os.environ["VLLM_DP_MASTER_PORT"] = str(port)
        started = time.monotonic()
        llm = LLM(**options, distributed_executor_backend="uni")
        output = llm.generate(["At dusk"], greedy, use_tqdm=False)[0].outputs[0]
        status = oproj_patch.status()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        # What the C library keeps of freed memory depends on how its threads came to run.
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        told.append(
            {
                "seconds": time.monotonic() - started,
                "tokens": list(output.token_ids),
                "layers": status.layers,
                "exchanges": status.exchanges,
                "ranks": oproj_patch.status().otp_ranks,
                "groups": len(torch.distributed.distributed_c10d._world.pg_map),
                "objects": sum(type(x) is otp_group.OtpGroup for x in gc.get_objects()),
                "rss": pages * resource.getpagesize(),
                "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
                "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
            }
        )
    return told


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
