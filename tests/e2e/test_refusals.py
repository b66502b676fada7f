"""A setting that cannot work ends every rank with one sentence, before any weight is loaded."""

from __future__ import annotations

import pytest

from oproj_patch.cli.engines import EngineError, Round, run_offline

from .lab import DENSE, Lab


@pytest.mark.parametrize(
    ("toggle", "dp", "code"),
    [("two", 2, "OPROJ001"), ("4", 2, "OPROJ003"), ("2", 1, "OPROJ003")],
)
def test_group_size(lab: Lab, toggle: str, dp: int, code: str) -> None:
    config = lab.config(DENSE, otp=toggle, dp=dp)
    with pytest.raises(EngineError) as caught:
        run_offline(config, [Round([["The "]] * dp, [1] * dp)], deadline=120)
    assert len(caught.value.logs) == dp
    for log in caught.value.logs:
        shown = toggle if toggle.isdigit() else repr(toggle)
        assert f"{code}: OPROJ_TENSOR_PARALLEL_SIZE is {shown}; " in log
        assert "Loading weights took" not in log
