"""vLLM on a Ray cluster that was started without our variable: every actor shards nevertheless."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from demo import engines

from ..hosts import wheels
from . import warm
from .runs import (
    FEW_TOKENS,
    PROMPTS,
    STORY_TELLER,
    TOGGLE,
    EngineRuns,
    assert_continued,
    assert_sharded,
)
from .serving import Request, answers

RAY = ("ray==2.60.0", "msgpack==1.1.1")
PLUGIN = Path(__file__).parent / "ray_plugin"
NODE = "127.0.0.2"
"""Ray replaces 127.0.0.1 by an address that others can reach."""


@pytest.fixture(scope="module")
def cluster(runs: EngineRuns) -> Iterator[engines.EngineConfig]:
    """One node with room for two ranks; the configuration of an engine on it."""
    path = (PLUGIN, *wheels.extras(*RAY))
    config = replace(runs.config(STORY_TELLER, otp=2), python_path=path)
    address = f"{NODE}:{engines.free_port()}"
    # The names of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:
        started = {
            "port": address.rpartition(":")[2],
            "node_ip_address": NODE,
            "num_cpus": 4,
            "resources": {"oproj_device": 2},
            "object_store_memory": 80 << 20,
            "temp_dir": short,
            "include_dashboard": "false",
            "min_worker_port": 0,
            "max_worker_port": 0,
            "dashboard_agent_listen_port": 0,
        }
        work = Path(short, "work")
        work.mkdir()
        env = engines.environment(replace(config, env={}), work)
        assert TOGGLE not in env
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--disable-usage-stats", *engines.flags(started)]
        with engines.process(command, env, work / "log", deadline=900) as head:
            end = time.monotonic() + 120
            while "Ray runtime started" not in head.log():
                assert not head.ended() and time.monotonic() < end, head.log()
                time.sleep(0.1)
            # Ray tells only once what two actors print alike, unless it is imported under this.
            dedup = {"RAY_DEDUP_LOGS": "0"}
            env = {**config.env, **dedup, "RAY_ADDRESS": address, "VLLM_HOST_IP": NODE}
            yield replace(config, env=env, start=warm.zygote(*path, **dedup).start)


@pytest.mark.deployment("`--data-parallel-backend ray`", "DP=2, N=2; cluster without the variable")
def test_engines_are_actors(runs: EngineRuns, cluster: engines.EngineConfig) -> None:
    answer_and_compare(runs, cluster, data_parallel_backend="ray")


@pytest.mark.deployment(
    "`--distributed-executor-backend ray`", "DP=2, N=2; cluster without the variable"
)
def test_workers_are_actors(runs: EngineRuns, cluster: engines.EngineConfig) -> None:
    answer_and_compare(runs, cluster, distributed_executor_backend="ray")


def answer_and_compare(runs: EngineRuns, config: engines.EngineConfig, **options: str) -> None:
    """Both ranks answer at once, then rank 1 alone."""
    requests = [Request(prompt, FEW_TOKENS, index % 2) for index, prompt in enumerate(PROMPTS[:8])]
    with engines.serve(replace(config, options=options)) as server:
        told = answers(server, requests)
        told += answers(server, [Request(PROMPTS[8], FEW_TOKENS, 1)])
        end = time.monotonic() + 20
        while server.log().count(": o_proj sharded") < 2 and time.monotonic() < end:
            time.sleep(0.2)  # Ray takes its time to hand on what actors print
        assert_sharded(server.workers(), [server.log()], dp=2, otp=2, steps=2 * FEW_TOKENS)
    assert_continued(runs.off(STORY_TELLER), told)
