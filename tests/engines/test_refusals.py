"""A start that cannot work: every rank ends, and the launcher says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.engines import EngineConfig, EngineError, Round, run_offline

from . import warm
from .runs import DENSE, EngineRuns


@pytest.mark.parametrize(
    ("toggle", "dp", "code"),
    [("two", 2, "OPROJ001"), ("4", 2, "OPROJ003"), ("2", 1, "OPROJ003")],
)
def test_group_size(runs: EngineRuns, toggle: str, dp: int, code: str) -> None:
    """Each rank ends with one sentence, before any weight is loaded."""
    config = runs.config(DENSE, otp=toggle, dp=dp)
    with pytest.raises(EngineError) as caught:
        run_offline(config, [Round([["The "]] * dp, [1] * dp)], deadline=120)
    assert len(caught.value.logs) == dp
    for log in caught.value.logs:
        shown = toggle if toggle.isdigit() else repr(toggle)
        assert f"{code}: OPROJ_TENSOR_PARALLEL_SIZE is {shown}; " in log
        assert "Loading weights took" not in log


def test_a_failing_rank_is_reported_with_its_reason(tmp_path: Path) -> None:
    config = EngineConfig(tmp_path / "no-such-model", dp=1, start=warm.zygote().start)
    with pytest.raises(EngineError, match="rank 0 of 1 ended without a result") as caught:
        run_offline(config, [Round([["x"]], [1])], deadline=120)
    assert "no-such-model" in str(caught.value)
    assert "Traceback" in caught.value.logs[0]
