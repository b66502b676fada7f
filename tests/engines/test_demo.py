"""The demo as its users start it: a process, its exit code, and one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from demo import model as demo_model
from oproj_patch.cli.plan import load_model, make_plan

from .runs import EngineRuns

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600


def test_demo_and_the_plan_of_its_model(runs: EngineRuns) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    assert (told["identical"], told["prompts"], told["otp_size"]) == (True, 12, 2)
    assert min(told["exchanges"]["on"]) > 0 and told["exchanges"]["off"] == [0, 0]
    assert 0 < told["seconds"] < SECONDS
    # Progress was shown while the engines started.
    assert "vLLM ready on 0 of 2 ranks" in done.stderr

    model = str(demo_model.ensure("dense", trained=True))
    plan = make_plan(model, load_model(model, "fp32"), dp=2)
    (row,) = plan["rows"]
    assert told["o_proj_bytes"] == {
        "off": [plan["unsharded_bytes_per_rank"]] * 2,
        "on": [row["o_proj_bytes_per_rank"]] * 2,
    }
    assert row["saved_bytes_per_rank"] == told["o_proj_bytes"]["off"][0] // 2
