"""Offline ``vllm.LLM``: the same tokens, 1/N of the weights, and the exchange ran."""

from __future__ import annotations

import re

import pytest

from oproj_patch.cli.engines import EngineConfig, Round, run_offline

from . import lab as labs
from .lab import DENSE, MOE, STORY_TELLER, Lab, spread


@pytest.mark.parametrize(
    ("model", "compiled"),
    [
        pytest.param(STORY_TELLER, False, id="dense-eager"),
        pytest.param(DENSE, True, id="dense-compiled"),
        pytest.param(MOE, False, id="moe-eager"),
        pytest.param(MOE, True, id="moe-compiled"),
    ],
)
def test_two_ranks(lab: Lab, model: labs.Model, compiled: bool) -> None:
    """DP=2, otp=2. A compiled run finds the unpatched one's compile cache warm."""
    off = lab.off(model, compiled=compiled)
    on = lab.on(model, 2, compiled=compiled)
    labs.assert_same_tokens(off, on)


@pytest.mark.parametrize("otp", [2, 4])
def test_four_ranks(lab: Lab, otp: int) -> None:
    """DP=4 as two groups of two and as one of four, against an unpatched DP=2."""
    on = lab.on(STORY_TELLER, otp, dp=4)
    labs.assert_same_tokens(lab.off(STORY_TELLER), on)


def test_tensor_parallel(lab: Lab) -> None:
    """TP=2 x DP=2, otp=2: groups [0, 2] and [1, 3]; vLLM's own all-reduce follows ours."""
    on = lab.on(STORY_TELLER, 2, tp=2)
    labs.assert_same_tokens(lab.off(STORY_TELLER), on)


def test_compile_cache_of_the_other_setting(lab: Lab) -> None:
    """off, on, off with one compile cache: the toggle never leads to the other's graphs.

    Each rank looks for its graph under a hash of the configuration. Whether the CPU backend can
    load what it finds there is vLLM's affair; that it looks in the right place is ours.
    """
    off = lab.off(DENSE, compiled=True)
    on = lab.on(DENSE, 2, compiled=True)
    warm_off = run_offline(lab.config(DENSE, otp=None, compiled=True), spread(2))
    labs.assert_unpatched(warm_off.workers, warm_off.logs)
    labs.assert_same_tokens(off, warm_off)
    labs.assert_same_tokens(off, on)
    assert len(graph_files(off)) == len(graph_files(on)) == 2
    assert graph_files(warm_off) == graph_files(off)
    assert not graph_files(off) & graph_files(on)


def graph_files(run: labs.OfflineRun) -> set[str]:
    """Return the files that vLLM said it loaded, saved or could not use: one a rank."""
    return set(re.findall(r"/torch_aot_compile/(\w+/rank_\d+_\d+/model)", "\n".join(run.logs)))


def test_plugin_alone(lab: Lab) -> None:
    """Without the probe nothing but vLLM's entry point can load the shim in a worker."""
    config = lab.config(STORY_TELLER, otp=2)
    bare = EngineConfig(config.model, env=config.env, extension=None)
    run = run_offline(bare, [Round([labs.PROMPTS[:2], labs.PROMPTS[2:4]], [12, 12])])
    labs.assert_info_lines(run.logs, workers=2, otp=2)
    labs.assert_same_tokens(lab.off(STORY_TELLER), run)
