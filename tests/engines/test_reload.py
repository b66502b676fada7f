"""New weights for a running engine: each rank takes its shard of them, and answers by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from demo import model as demo_model
from demo.engines import Completion, Server, serve

from . import weights
from .runs import (
    FEW_TOKENS,
    PROMPTS,
    STORY_TELLER,
    EngineRuns,
    assert_continued,
    assert_sharded,
)
from .serving import Request, answers

TIMES = 10
COLUMNS = demo_model.O_PROJ_IN // 2


@pytest.mark.deployment(
    "`update_config` and `reload_weights`", "DP=2, N=2; after a dummy load, and ten changes"
)
@pytest.mark.deployment("`load_weights` with whole tensors", "DP=2, N=2; after each, the tokens")
@pytest.mark.deployment("sparse patches of a checkpoint", "DP=2, N=2; forth and back")
def test_ten_times(runs: EngineRuns) -> None:
    told: list[Completion] = []
    config = runs.config(STORY_TELLER, otp=2, load_format="dummy")
    checkpoint = str(config.model)
    right, patched = shards(config.model, 0.0), shards(config.model, 1.0)
    with serve(replace(config, extension="tests.engines.reloading.Probe")) as server:
        server.call("update_config", {"load_config": {"load_format": "auto"}})
        for time in range(TIMES):
            assert not any(a in right[0] + right[1] for held in digests(server) for a in held)
            if time % 3 == 0:
                server.call("reload_weights")
            elif time % 3 == 1:
                server.call("oproj_load_full", checkpoint)
            else:
                server.call("oproj_load_full", checkpoint)
                server.call("oproj_load_sparse", checkpoint, 1.0)
                assert digests(server) == patched
                server.call("oproj_load_sparse", checkpoint, 0.0)
            assert digests(server) == right
            prompts = PROMPTS[2 * time : 2 * time + 2]
            requests = [Request(prompt, FEW_TOKENS, rank) for rank, prompt in enumerate(prompts)]
            told += answers(server, requests)
            server.call("oproj_damage")
        assert_sharded(server.workers(), [server.log()], dp=2, otp=2, steps=TIMES * FEW_TOKENS)
    assert_continued(runs.off(STORY_TELLER), told)


def digests(server: Server) -> list[list[str]]:
    """What each rank holds now, in the order of the layers."""
    held = [worker["digests"] for worker in server.workers()]
    return [[of_rank[name] for name in sorted(of_rank)] for of_rank in held]


def shards(checkpoint: Path, more: float) -> list[list[str]]:
    """What each rank must hold; more: added to what a sparse patch replaces."""
    whole = load_file(checkpoint / "model.safetensors")
    found: list[list[str]] = [[], []]
    for name in sorted(name for name in whole if name.endswith("o_proj.weight")):
        weight = whole[name].contiguous()
        if more:
            weight.view(-1)[:: weights.STRIDE] += more
        for rank in (0, 1):
            columns = weight[:, rank * COLUMNS : (rank + 1) * COLUMNS]
            found[rank].append(weights.digest(columns))
    return found
