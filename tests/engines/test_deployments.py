"""The ways in which people start vLLM: the tokens of the unsharded engine, from shards."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from demo import engines
from demo import model as demo_model
from demo.engines import OfflineRun, Round, run_offline

from .runs import (
    PROMPTS,
    STORY_TELLER,
    EngineRuns,
    assert_continued,
    assert_round_sizes,
    assert_same_tokens,
    assert_sharded,
)
from .serving import Request, answers, assert_gauges, instance, samples, until_healthy

TOKENS = 8
ROUNDS = [  # both ranks busy; rank 0 soon done; rank 0 idle
    Round([PROMPTS[0:6:2], PROMPTS[1:6:2]], [TOKENS, TOKENS]),
    Round([PROMPTS[6:7], PROMPTS[7:11]], [2, TOKENS]),
    Round([[], PROMPTS[11:13]], [1, TOKENS]),
]
STEPS = 3 * TOKENS  # of the model on each rank, at least


def requests(prompts: Sequence[str], **options: Any) -> list[Request]:
    return [Request(prompt, TOKENS, **options) for prompt in prompts]


# -- servers --------------------------------------------------------------------------------------


@pytest.mark.deployment(
    "external load balancer (`--data-parallel-rank`)",
    "DP=2, N=2; rank 1 is started first and idle, then both are busy",
)
def test_external_load_balancer(runs: EngineRuns) -> None:
    config = runs.config(STORY_TELLER, otp=2)
    options = {
        "data_parallel_size": 2,
        "data_parallel_address": "127.0.0.1",
        "data_parallel_rpc_port": engines.free_port(),
    }
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(instance(config, workers=1, data_parallel_rank=rank, **options))
            for rank in (1, 0)
        ]
        until_healthy(*ranks)
        ranks.reverse()
        told = answers(ranks[0], requests(PROMPTS[:6]))
        for rank, server in enumerate(ranks):
            told += answers(server, requests(PROMPTS[6 + rank :: 2]))
        workers = [worker for server in ranks for worker in server.workers()]
        logs = [server.log() for server in ranks]
    assert_continued(runs.off(STORY_TELLER), told)
    assert_sharded(workers, logs, dp=2, otp=2, steps=STEPS)


@pytest.mark.deployment(
    "hybrid load balancer (`--data-parallel-start-rank`)",
    "DP=4, N=4 across two nodes (two local addresses) of two ranks, each with an API server; "
    "one node is idle, then both are busy",
)
def test_hybrid_load_balancer(runs: EngineRuns) -> None:
    port = engines.free_port()
    with contextlib.ExitStack() as stack:
        nodes = []
        for node, address in enumerate(("127.0.0.1", "127.0.0.2")):
            config = runs.config(STORY_TELLER, otp=4)
            config = replace(config, env={**config.env, "VLLM_HOST_IP": address})
            started = instance(
                config,
                workers=2,
                host=address,
                data_parallel_size=4,
                data_parallel_size_local=2,
                data_parallel_start_rank=2 * node,
                data_parallel_address="127.0.0.1",
                data_parallel_rpc_port=port,
                api_server_count=1,
            )
            nodes.append(stack.enter_context(started))
        until_healthy(*nodes)
        told = answers(nodes[1], requests(PROMPTS[:2]))
        for node, server in enumerate(nodes):
            told += answers(server, requests(PROMPTS[2 + node : 8 : 2]))
        workers = [worker for server in nodes for worker in server.workers()]
        logs = [server.log() for server in nodes]
    assert_continued(runs.off(STORY_TELLER), told)
    assert_sharded(workers, logs, dp=4, otp=4, steps=2 * TOKENS)


@pytest.mark.deployment("two API servers (`--api-server-count 2`)", "DP=2, N=2; gauges")
def test_two_api_servers(runs: EngineRuns) -> None:
    config = runs.config(STORY_TELLER, otp=2)
    options = {"data_parallel_size": 2, "api_server_count": 2}
    with instance(config, workers=2, **options) as server:
        until_healthy(server)
        told = answers(server, requests(PROMPTS))
        told += answers(server, requests(PROMPTS[:4], rank=1))
        assert_gauges(server)
        workers, log = server.workers(), server.log()
    assert all(f"ApiServer_{number} " in log for number in (0, 1))
    assert_continued(runs.off(STORY_TELLER), told)
    assert_sharded(workers, [log], dp=2, otp=2, steps=2 * TOKENS)


@pytest.mark.deployment(
    "prefix caching with chunked prefill",
    "DP=2, N=2, MLA off; prompts of three chunks while one rank is idle, then from the cache",
)
def test_prefix_caching_with_chunked_prefill(runs: EngineRuns) -> None:
    """On a CPU vLLM has neither with MLA. The tokens are the same with and without MLA."""
    chunk, block = 48, 32
    config = runs.config(STORY_TELLER, otp=2)
    config = replace(config, env={**config.env, "VLLM_MLA_DISABLE": "1"})
    options = {
        "data_parallel_size": 2,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": chunk,
        "block_size": block,
    }
    prompts = sorted(PROMPTS, key=len)[-6:]
    assert 3 * block < 2 * chunk + 1 < len(prompts[0])
    with instance(config, workers=2, api_server_count=1, **options) as server:
        until_healthy(server)
        told = answers(server, requests(prompts, rank=0))
        told += answers(server, requests(prompts, rank=0) + requests(prompts[:3], rank=1))
        cached = samples(server, "vllm:prefix_cache_hits_total")
        workers, log = server.workers(), server.log()
    # All whole blocks of each prompt, the second time.
    assert cached["vllm:prefix_cache_hits_total", "0"] >= len(prompts) * 3 * block
    assert_continued(runs.off(STORY_TELLER), told)
    assert_sharded(workers, [log], dp=2, otp=2, steps=2 * TOKENS)


# -- programs -------------------------------------------------------------------------------------


@pytest.mark.deployment(
    "engine in the program (`VLLM_ENABLE_V1_MULTIPROCESSING=0`)", "DP=2, N=2; idle ranks"
)
def test_engine_in_the_program(runs: EngineRuns) -> None:
    config = runs.config(STORY_TELLER, otp=2)
    config = replace(config, env={**config.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    on = run_offline(config, ROUNDS)
    assert_in_the_program(on)
    assert_two_ranks(runs, on)


@pytest.mark.deployment(
    "`--distributed-executor-backend external_launcher`", "DP=2, N=2; idle ranks"
)
def test_external_launcher(runs: EngineRuns) -> None:
    """The environment of each rank is what torchrun gives it."""
    options = {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    config = runs.config(STORY_TELLER, otp=2, **options)
    port = str(engines.free_port())

    def start(command: Sequence[str], env: Mapping[str, str], *rest: Any) -> Any:
        rank = env["VLLM_DP_RANK"]
        kept = {name: value for name, value in env.items() if not name.startswith("VLLM_DP_")}
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return config.start(command, kept | own | master, *rest)

    on = run_offline(replace(config, start=start), ROUNDS)
    assert_in_the_program(on)
    assert_two_ranks(runs, on)


@pytest.mark.deployment(
    "`--enable-expert-parallel`", "DP=2, N=2; no expert is dispatched; idle ranks"
)
def test_expert_parallel(runs: EngineRuns) -> None:
    """vLLM's CPU kernels of experts have no map of experts, so the model is the dense one."""
    config = runs.config(STORY_TELLER, otp=2, enable_expert_parallel=True)
    on = run_offline(config, ROUNDS)
    assert "'enable_expert_parallel': True" in on.logs[0]
    assert_two_ranks(runs, on)


def assert_in_the_program(on: OfflineRun) -> None:
    """No process of its own runs the engine: vLLM names it in the lines that it logs."""
    assert not any("(EngineCore" in log for log in on.logs)


def assert_two_ranks(runs: EngineRuns, on: OfflineRun) -> None:
    assert_round_sizes(on, ROUNDS)
    assert_same_tokens(runs.off(STORY_TELLER), on)
    assert_sharded(on.workers, on.logs, dp=2, otp=2, steps=STEPS)


@pytest.mark.deployment(
    "pipeline parallelism (`--pipeline-parallel-size 2`)", "PP=2 x DP=2, N=2; idle ranks"
)
def test_pipeline_parallel(runs: EngineRuns) -> None:
    """Groups [0, 2] and [1, 3]: each has the layers of its stage."""
    config = runs.config(STORY_TELLER, otp=2, pipeline_parallel_size=2)
    config = replace(config, extension="tests.engines.pipeline.StageProbe")
    on = run_offline(config, ROUNDS)
    assert_round_sizes(on, ROUNDS)
    assert_same_tokens(runs.off(STORY_TELLER), on)
    places = [(worker["dp_rank"], worker["pp_rank"]) for worker in on.workers]
    assert sorted(places) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for worker in on.workers:
        status, layers, stage = worker["status"], worker["layers"], worker["pp_rank"]
        assert status["otp_ranks"] == [stage, 2 + stage]
        shapes = [layer["shape"] for layer in layers.values()]
        assert shapes == [[demo_model.HIDDEN_SIZE, demo_model.O_PROJ_IN // 2]] * len(layers)
        assert status["layers"] == len(layers) in (1, 2)
        assert status["exchanges"] >= STEPS * len(layers)
        said = f"o_proj sharded 2-way over ranks [{stage}, {2 + stage}]: {len(layers)} layers, "
        assert on.logs[worker["dp_rank"]].count(said) == 1
