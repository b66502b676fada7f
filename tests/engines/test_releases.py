"""The oldest release whose compiled kernels run beside the installed torch, as a full engine."""

from __future__ import annotations

from .runs import DENSE, EngineRuns, assert_same_tokens

OLDEST = "0.28.0"


def test_oldest_engine(runs: EngineRuns) -> None:
    """DP=2, otp=2: the tokens of that release without the shim, from shards, by exchanges."""
    off = runs.off(DENSE, release=OLDEST)
    on = runs.on(DENSE, 2, release=OLDEST)
    for run in (off, on):
        # The first data-parallel rank of a machine says it.
        assert f"Initializing a V1 LLM engine (v{OLDEST})" in run.logs[0]
    assert [w["status"]["versions"]["vllm"] for w in on.workers] == [OLDEST] * 2
    assert_same_tokens(off, on)
