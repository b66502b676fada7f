"""Offline `vllm.LLM`: the same tokens, 1/N of the weights, and the exchange ran."""

from __future__ import annotations

import re

import pytest

from demo.engines import OfflineRun, run_offline

from .runs import (
    DENSE,
    MOE,
    STORY_TELLER,
    EngineRuns,
    Model,
    assert_same_tokens,
    assert_unpatched,
    spread,
)


@pytest.mark.parametrize(
    ("model", "compiled"),
    [
        pytest.param(STORY_TELLER, False, id="dense-eager"),
        pytest.param(DENSE, True, id="dense-compiled"),
        pytest.param(MOE, True, id="moe-compiled"),
    ],
)
def test_two_ranks(runs: EngineRuns, model: Model, compiled: bool) -> None:
    """DP=2, otp=2. A compiled run finds the unpatched one's compile cache warm."""
    off = runs.off(model, compiled=compiled)
    on = runs.on(model, 2, compiled=compiled)
    assert_same_tokens(off, on)


@pytest.mark.smoke
def test_experts(runs: EngineRuns) -> None:
    """DP=2, otp=2, eager; `test_demo` starts its ranks as users do."""
    on = runs.on(MOE, 2)
    assert_same_tokens(runs.off(MOE), on)


@pytest.mark.parametrize("otp", [2, 4])
def test_four_ranks(runs: EngineRuns, otp: int) -> None:
    """DP=4 as two groups of two and as one of four, against an unpatched DP=2."""
    on = runs.on(STORY_TELLER, otp, dp=4)
    assert_same_tokens(runs.off(STORY_TELLER), on)


@pytest.mark.parametrize(
    ("model", "compiled"),
    [
        pytest.param(STORY_TELLER, False, id="eager"),
        pytest.param(DENSE, True, id="compiled", marks=pytest.mark.long),
    ],
)
def test_two_by_two(runs: EngineRuns, model: Model, compiled: bool) -> None:
    """DP=4, otp=4: each rank has half of the columns and half of the outputs."""
    on = runs.on(model, 4, dp=4, compiled=compiled, grid="2x2")
    assert_same_tokens(runs.off(model, compiled=compiled), on)


def test_output_cut_compiled(runs: EngineRuns) -> None:
    """DP=2, otp=2: each rank has all columns of half of the outputs."""
    on = runs.on(MOE, 2, compiled=True, grid="1x2")
    assert_same_tokens(runs.off(MOE, compiled=True), on)


@pytest.mark.deployment("`vllm.LLM`, one program per rank", "DP=2 x TP=2, N=2; idle ranks")
def test_tensor_parallel(runs: EngineRuns) -> None:
    """TP=2 x DP=2, otp=2: groups [0, 2] and [1, 3]; vLLM's own all-reduce follows ours."""
    on = runs.on(STORY_TELLER, 2, tp=2)
    assert_same_tokens(runs.off(STORY_TELLER), on)


def test_compile_cache_of_the_other_setting(runs: EngineRuns) -> None:
    """off, on, off with one compile cache: the toggle never leads to the other's graphs.

    Each rank looks for its graph under a hash of the configuration. Whether the CPU backend can
    load what it finds there is vLLM's affair; that it looks in the right place is ours.
    """
    off = runs.off(DENSE, compiled=True)
    on = runs.on(DENSE, 2, compiled=True)
    warm_off = run_offline(runs.config(DENSE, otp=None, compiled=True), spread(2))
    assert_unpatched(warm_off.workers, warm_off.logs)
    assert_same_tokens(off, warm_off)
    assert_same_tokens(off, on)
    assert len(graph_files(off)) == len(graph_files(on)) == 2
    assert graph_files(warm_off) == graph_files(off)
    assert not graph_files(off) & graph_files(on)


def graph_files(run: OfflineRun) -> set[str]:
    """Return the files that vLLM said it loaded, saved or could not use: one per rank."""
    return set(re.findall(r"/torch_aot_compile/(\w+/rank_\d+_\d+/model)", "\n".join(run.logs)))
