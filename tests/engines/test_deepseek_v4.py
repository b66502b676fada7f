"""DeepSeek V4 from request to token: wo_b alone, and wo_a with it.

Stand-ins: two Triton launches, a list of names (see `cpu_v4`), and the kernels that vLLM builds
for AVX-512 only where they are missing (see `v4_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo import model as demo_model
from demo.engines import EngineConfig, OfflineRun, Round, run_offline

from . import v4, warm
from .runs import TOGGLE, EngineRuns, assert_round_sizes, completions

PROMPTS = demo_model.prompts(8)
# All ranks; one short request beside many; an idle rank.
ROUNDS = [
    Round([PROMPTS[:3], PROMPTS[3:6]], [8, 8]),
    Round([PROMPTS[6:7], PROMPTS[:5]], [2, 8]),
    Round([[], PROMPTS[5:]], [1, 6]),
]
Run = Callable[..., OfflineRun]


@pytest.fixture(scope="module")
def v4_run(tmp_path_factory: pytest.TempPathFactory, runs: EngineRuns) -> Iterator[Run]:
    """Return a run of two ranks, each made once; `grid` None is unpatched."""
    found: dict[Any, OfflineRun] = {}
    models: dict[bool, Path] = {}

    def run(grid: str | None = None, zeroed: bool = False) -> OfflineRun:
        key = grid, zeroed
        if zeroed not in models:
            models[zeroed] = v4.make(tmp_path_factory.mktemp("v4"), zeroed)
        if key not in found:
            config = EngineConfig(
                models[zeroed],
                env={} if grid is None else {TOGGLE: "2", "OPROJ_GRID": grid},
                options={
                    "dtype": "bfloat16",
                    "tokenizer_mode": "hf",
                    "compilation_config": {"custom_ops": ["none", "+hc_head"]},
                },
                extension="cpu_v4.V4WorkerProbe",
                python_path=(Path(__file__).parent,),
                start=warm.zygote().start,
            )
            found[key] = run_offline(config, ROUNDS)
            assert_round_sizes(found[key], ROUNDS)
        return found[key]

    yield run


def tokens(run: OfflineRun) -> list[list[int]]:
    return [completion.token_ids for completion in completions(run)]


def test_text_depends_on_wo_b(v4_run: Run) -> None:
    assert tokens(v4_run()) != tokens(v4_run(zeroed=True))


@pytest.mark.parametrize(("grid", "both"), [("auto", True), ("1x2", False)], ids=["both", "wo_b"])
def test_same_tokens(v4_run: Run, grid: str, both: bool) -> None:
    check(v4_run(), v4_run(grid), both)


def check(off: OfflineRun, on: OfflineRun, both: bool) -> None:
    """The tokens are the same, and every worker holds half and exchanged at every layer."""
    assert tokens(on) == tokens(off)
    whole = v4.BOTH_BYTES if both else v4.WO_B_BYTES
    for worker in on.workers:
        status = worker["status"]
        assert (status["layers"], status["grid"]) == (v4.LAYERS, "2x1" if both else "1x2")
        assert status["bytes_kept"] == status["bytes_saved"] == whole // 2
        held = sum(v["bytes"] for k, v in worker["layers"].items() if both or "wo_b" in k)
        assert held == whole // 2
        # At least a step a layer for each token of the longest answers.
        assert status["exchanges"] >= v4.LAYERS * (8 + 8 + 6)
        assert status["exchanges"] % v4.LAYERS == 0
    assert {worker["status"]["exchanges"] for worker in off.workers} == {0}
    told = "layers with their wo_a" if both else "layers is whole (the grid 1x2 cuts the outputs)"
    assert all(told in log for log in on.logs)
