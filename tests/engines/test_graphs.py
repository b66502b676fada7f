"""Whole engines of the newest vLLM on a CPU, device graphs emulated: the same tokens sharded.

vLLM decides what is captured and replayed, in its own processes; attention, which is no kernel on
a CPU, is split off, or runs in the graph as one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from demo import model as demo_model
from demo.engines import EngineConfig, OfflineRun, Round, run_offline

from . import drafter, warm
from .runs import PLUGIN, SECOND_RUNNER, assert_info_lines

PROMPTS = demo_model.prompts(8)
CAPTURE_SIZES = [1, 2, 4, 8, 16]
# Both busy; one much shorter; one idle. Prefills exceed the largest graph, decodes straddle sizes.
ROUNDS = [
    Round([PROMPTS[0::2], PROMPTS[1::2]], [6, 6]),
    Round([PROMPTS[:1], PROMPTS[1:5]], [2, 8]),
    Round([[], PROMPTS[5:7]], [1, 6]),
]
MODES = {  # whether on the second runner: the modes
    False: ("FULL_AND_PIECEWISE", "PIECEWISE"),
    True: ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"),
}


@functools.cache
def run(
    mode: str, size: int, second: bool, drafting: Path | None = None, dp: int = 2, grid: str = ""
) -> OfflineRun:
    """`dp` data-parallel ranks in one graph mode, sharded `size`-way (0: not) on `grid`.

    drafting: a checkpoint with an MTP layer, which drafts one token a step. With four ranks only
    the first two have requests.
    """
    options: dict[str, Any] = {
        "compilation_config": {
            "backend": "eager",
            "custom_ops": ["none"],
            "cudagraph_mode": mode,
            "cudagraph_capture_sizes": CAPTURE_SIZES,
            "cudagraph_num_of_warmups": 1,
        },
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
    }
    if drafting is not None:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    env = {"OPROJ_TENSOR_PARALLEL_SIZE": str(size), "OPROJ_GRID": grid} if size else {}
    if second:
        options["kernel_config"] = {"enable_jit_warmup": False}
        env |= SECOND_RUNNER
    config = EngineConfig(
        drafting or demo_model.ensure("dense", trained=False),
        dp=dp,
        compiled=True,
        env=env,
        options=options,
        extension="tests.graphs.engine.GraphProbe",
        python_path=(PLUGIN,),
        start=warm.zygote(PLUGIN, **SECOND_RUNNER if second else {}).start,
    )
    rounds = [
        Round([*entry.prompts, *[[]] * (dp - 2)], [*entry.max_tokens, *[1] * (dp - 2)])
        for entry in ROUNDS
    ]
    return run_offline(config, rounds, deadline=900)


def tokens(found: OfflineRun) -> list[list[list[list[int]]]]:
    return [[[c.token_ids for c in entry] for entry in rank] for rank in found.completions]


@pytest.mark.deployment("device graphs, emulated, on both model runners", "DP=2, N=2; idle ranks")
@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    ("mode", "second"),
    [(mode, second) for second, modes in MODES.items() for mode in modes],
    ids=lambda value: {False: "first-runner", True: "second-runner"}.get(value, value),
)
def test_same_tokens(mode: str, second: bool) -> None:
    """Each completion equals the unsharded engine's; graphs were replayed."""
    whole_mode = MODES[second][0]
    on, off = run(mode, 2, second), run(whole_mode, 0, second)
    assert tokens(on) == tokens(off)
    assert_info_lines(on.logs, workers=2, otp=2, grid="2x1")
    for log in on.logs:
        assert ("Using V2 Model Runner" in log) == second
    for sharded, whole in zip(on.workers, off.workers, strict=True):
        assert sharded["status"]["size"] == 2 and not whole["status"]["enabled"]
        # As many graphs as without the shim. How many steps an idle rank replays is chance.
        assert sharded["captures"] >= len(CAPTURE_SIZES)
        assert mode != whole_mode or sharded["captures"] == whole["captures"]
        assert sharded["replays"] > 0 and whole["replays"] > 0
        # Eager steps (prefills, warm-ups) are exchanges in Python, replays are not.
        assert sharded["status"]["exchanges"] > 0


@pytest.mark.long
@pytest.mark.timeout(2000)
def test_two_by_two() -> None:
    """Four ranks on a grid: each captures the graphs of two ranks that are not sharded."""
    mode = MODES[False][0]
    on, off = run(mode, 4, False, dp=4, grid="2x2"), run(mode, 0, False)
    assert tokens(on)[:2] == tokens(off)
    for sharded in on.workers:
        status = sharded["status"]
        assert (status["size"], status["grid"], status["layers"]) == (4, "2x2", 3)
        assert sharded["captures"] == off.workers[0]["captures"] >= len(CAPTURE_SIZES)
        assert sharded["replays"] > 0 and status["exchanges"] > 0
    assert sum("; grid 2x2" in log for log in on.logs) == 4


@pytest.mark.timeout(2000)
def test_a_drafting_layer_in_graphs(tmp_path: Path) -> None:
    """The same with an MTP layer, whose o_proj is sharded and captured too."""
    model = drafter.add(demo_model.ensure("dense", trained=True), tmp_path / "model")
    on, off = (run("FULL_AND_PIECEWISE", size, False, model) for size in (2, 0))
    assert tokens(on) == tokens(off)
    for sharded, whole in zip(on.workers, off.workers, strict=True):
        assert sharded["status"]["layers"] == demo_model.NUM_LAYERS + 1
        assert sharded["captures"] == whole["captures"] > len(CAPTURE_SIZES)
        assert sharded["replays"] > 0 and whole["replays"] > 0
