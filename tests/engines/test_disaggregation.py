"""Prefill and decode on instances of their own: the tokens of one engine without the shim."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from demo import model as demo_model
from demo.engines import Completion, EngineError, Round, Server, run_offline

from .prefill_decode import at_rest, instance, prefill_of
from .runs import (
    FEW_TOKENS,
    MAX_TOKENS,
    PROMPTS,
    STORY_TELLER,
    EngineRuns,
    assert_continued,
    assert_round_sizes,
    assert_same_tokens,
    assert_sharded,
    assert_unpatched,
)
from .serving import Request, answers, post

BLOCK = 16  # of vLLM's CPU backend for MLA


@pytest.fixture(scope="module")
def decode(runs: EngineRuns, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Two ranks that decode, on the first model runner or, with a true parameter, the second."""
    with instance(runs, "kv_consumer", dp=2, otp=2, second=request.param) as server:
        yield server


@pytest.mark.deployment(
    "prefill/decode, NixlConnector, on both model runners",
    "prefill DP=1 whole or DP=2, N=2; decode DP=2, N=2; aborts, idle ranks",
)
@pytest.mark.parametrize(
    ("decode", "second", "otp"),
    [
        pytest.param(False, False, None, id="whole prefill"),
        pytest.param(False, False, 2, id="sharded prefill"),
        pytest.param(True, True, None, id="second runner"),
    ],
    indirect=["decode"],
)
def test_nixl(runs: EngineRuns, decode: Server, second: bool, otp: int | None) -> None:
    """Both ranks decode what the other instance prefilled, also after aborts."""
    before, dp = at_rest(decode), otp or 1
    most = FEW_TOKENS if second else MAX_TOKENS  # the second runner is interpreted
    requests = [Request(prompt, most, index % 2) for index, prompt in enumerate(PROMPTS)]
    told: list[Completion] = []
    with instance(runs, "kv_producer", dp, otp, second) as prefill:

        def relay(*requests: Request) -> None:
            with ThreadPoolExecutor(4) as pool:
                prefilled = pool.map(lambda request: prefill_of(prefill, dp, request), requests)
                told.extend(pool.map(lambda each: answers(decode, [each])[0], prefilled))

        relay(*requests[:8])
        for request in requests[8:10]:  # aborted while it is decoded
            streamed = prefill_of(prefill, dp, replace(request, more={"stream": True}))
            with post(decode, streamed) as response:
                assert response.readline().startswith(b"data: ")
        with pytest.raises(EngineError, match="timed out"):  # before it is decoded
            post(decode, prefill_of(prefill, dp, requests[10]), timeout=0.001)
        relay(*requests[11:13])
        assert_rank_1_works_alone(decode, lambda: relay(requests[13]), most)
        if otp:
            assert_sharded(prefill.workers(), [prefill.log()], dp=dp, otp=otp, steps=5)
        else:
            assert_unpatched(prefill.workers(), [prefill.log()])
        for server in (prefill, decode):
            assert ("Using V2 Model Runner" in server.log()) == second
    assert len(told) == 8 + 2 + 1
    assert_continued(runs.off(STORY_TELLER), told)
    received = [
        now["transfers"] - then["transfers"]
        for then, now in zip(before, at_rest(decode), strict=True)
    ]
    assert received[0] >= 4 + 1 + 1 and received[1] == 4 + 1 + 1 + 1
    assert_sharded(decode.workers(), [decode.log()], dp=2, otp=2, steps=4 * most)


def assert_rank_1_works_alone(server: Server, work: Callable[[], None], most: int) -> None:
    """While rank 1 works, rank 0 has one step for each layer of a dummy batch; then both rest.

    work: a request of rank 1 for `most` tokens.
    """
    before = at_rest(server)
    work()
    after = at_rest(server)
    steps, batches = (
        [now[what] - then[what] for then, now in zip(before, after, strict=True)]
        for what in ("exchanges", "dummy batches")
    )
    assert steps[0] == steps[1] == batches[0] * demo_model.NUM_LAYERS
    assert batches[0] >= most
    server.call("oproj_watch", 1.0)
    time.sleep(1.5)
    for now, worker in zip(after, server.workers(), strict=True):
        seen = worker["watched"]
        assert seen["samples"] > 5 and seen["host"] and not seen["ours"]
        assert worker["status"]["exchanges"] == now["exchanges"]


@pytest.mark.deployment("KV cache from files, ExampleConnector", "DP=2, N=2; idle ranks")
def test_files(runs: EngineRuns, tmp_path: Path) -> None:
    """Rank 1 goes on from what rank 0 computed, each while the other one is idle."""
    # A file has whole blocks; the connector misses one that ends right before the last token.
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 48 and (len(prompt) - 1) % BLOCK][:6]
    config = runs.config(
        STORY_TELLER,
        otp=2,
        kv_transfer_config={
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    )
    rounds = [Round([prompts, []], [2, 1]), Round([[], prompts], [1, MAX_TOKENS])]
    on = run_offline(config, rounds)
    assert_round_sizes(on, rounds)
    assert_same_tokens(runs.off(STORY_TELLER), on)
    taken = [re.findall(r"Inject KV cache of (\d+) tokens", log) for log in on.logs]
    assert taken[0] == [] and sorted(map(int, taken[1])) == sorted(
        (len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts
    )
    assert_sharded(on.workers, on.logs, dp=2, otp=2)
