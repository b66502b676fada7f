"""Prefill and decode on instances of their own: the tokens of one engine without the shim."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from demo import model as demo_model
from demo.engines import Server, free_port, serve

from ..hosts import wheels
from .runs import (
    MAX_TOKENS,
    PROMPTS,
    STORY_TELLER,
    EngineRuns,
    assert_sharded,
    assert_unpatched,
    longest_answers,
)

NIXL = (("nixl", "1.5.1"), ("nixl-cu12", "1.5.1"))
# No network but the loopback device.
UCX = {
    "UCX_TLS": "tcp,sm,self",
    "UCX_NET_DEVICES": "lo",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}


@contextlib.contextmanager
def instance(runs: EngineRuns, role: str, dp: int, otp: int | None) -> Iterator[Server]:
    """A server in the `role` of NixlConnector; NIXL's second thread leaves it a core of two."""
    config = runs.config(
        STORY_TELLER,
        otp=otp,
        dp=dp,
        kv_transfer_config={
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"num_threads": 1, "kv_lease_duration": 240},
        },
    )
    env = {**config.env, **ON_THIS_MACHINE, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(run=dp))}
    extension, path = "tests.engines.disaggregation.Probe", wheels.extras(*NIXL)
    with serve(replace(config, env=env, python_path=path, extension=extension)) as server:
        yield server


@pytest.fixture(scope="module")
def decode(runs: EngineRuns) -> Iterator[Server]:
    with instance(runs, "kv_consumer", dp=2, otp=2) as server:
        yield server


@pytest.mark.deployment("prefill/decode, NixlConnector", "prefill DP=1 or 2, decode DP=2, N=2")
@pytest.mark.parametrize("otp", [None, 2], ids=["whole prefill", "sharded prefill"])
def test_nixl(runs: EngineRuns, decode: Server, otp: int | None) -> None:
    """Both ranks decode what the other instance prefilled, also after aborts."""
    expected = longest_answers(runs.off(STORY_TELLER))
    before, dp = at_rest(decode), otp or 1
    with instance(runs, "kv_producer", dp, otp) as prefill:

        def answer(index: int, rank: int) -> None:
            body = prefilled(prefill, index % dp, PROMPTS[index])
            assert ask(decode, rank, body) == expected[PROMPTS[index]][:MAX_TOKENS]

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda index: answer(index, index % 2), range(8)))
        for rank in (0, 1):  # aborted while it is decoded
            body = prefilled(prefill, 0, PROMPTS[8 + rank])
            with post(decode, rank, body | {"stream": True}) as response:
                assert response.readline().startswith(b"data: ")
        with pytest.raises(TimeoutError):  # before it is decoded
            post(decode, 0, prefilled(prefill, 0, PROMPTS[10]), timeout=0.001)
        for rank in (0, 1):
            answer(11 + rank, rank)
        assert_rank_1_works_alone(decode, lambda: answer(13, 1))
        if otp:
            assert_sharded(prefill.workers(), [prefill.log()], dp=dp, otp=otp, tokens=1)
        else:
            assert_unpatched(prefill.workers(), [prefill.log()])
    received = [
        now["transfers"] - then["transfers"]
        for then, now in zip(before, at_rest(decode), strict=True)
    ]
    assert received[0] >= 4 + 1 + 1 and received[1] == 4 + 1 + 1 + 1
    assert_sharded(decode.workers(), [decode.log()], dp=2, otp=2)


def prefilled(prefill: Server, rank: int, prompt: str) -> dict[str, Any]:
    """Let `rank` of the prefill instance compute a prompt; return the request for the other."""
    whole = {"prompt": prompt, "kv_transfer_params": {"do_remote_decode": True}, "max_tokens": 1}
    with post(prefill, rank, whole) as response:
        params = json.load(response)["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    return {"prompt": prompt, "kv_transfer_params": params, "max_tokens": MAX_TOKENS}


def ask(server: Server, rank: int, body: dict[str, Any]) -> list[int]:
    """Return the tokens of one answer."""
    with post(server, rank, body) as response:
        tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
    return tokens


def post(server: Server, rank: int, body: dict[str, Any], timeout: float = 120.0) -> Any:
    greedy = {"model": "demo", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    call = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        data=json.dumps(greedy | body).encode(),
        headers={"Content-Type": "application/json", "X-data-parallel-rank": str(rank)},
    )
    return urllib.request.urlopen(call, timeout=timeout)


def assert_rank_1_works_alone(server: Server, work: Callable[[], None]) -> None:
    """While rank 1 works, rank 0 has one step for each layer of a dummy batch; later it rests."""
    before = at_rest(server)
    work()
    after = at_rest(server)
    steps, batches = (
        [now[what] - then[what] for then, now in zip(before, after, strict=True)]
        for what in ("exchanges", "dummy batches")
    )
    assert steps[0] == steps[1] == batches[0] * demo_model.NUM_LAYERS
    assert batches[0] >= MAX_TOKENS
    server.call("oproj_watch", 1.0)
    time.sleep(1.5)
    for now, worker in zip(after, server.workers(), strict=True):
        seen = worker["watched"]
        assert seen["samples"] > 5 and seen["host"] and not seen["ours"]
        assert worker["status"]["exchanges"] == now["exchanges"]


def at_rest(server: Server) -> list[dict[str, int]]:
    """Wait until no rank runs steps any more; return each rank's counts."""
    counts: list[dict[str, int]] = []
    end = time.monotonic() + 60
    while time.monotonic() < end:
        before = counts
        counts = [w["counts"] | {"exchanges": w["status"]["exchanges"]} for w in server.workers()]
        if counts == before:
            return counts
        time.sleep(0.5)
    raise AssertionError(f"the ranks go on: {counts}")
