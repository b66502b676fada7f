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
from .runs import PLUGIN, TOGGLE, EngineRuns, assert_round_sizes, completions

PROMPTS = demo_model.prompts(8)
# All ranks; one short request beside many; an idle rank.
ROUNDS = [
    Round([PROMPTS[:3], PROMPTS[3:6]], [8, 8]),
    Round([PROMPTS[6:7], PROMPTS[:5]], [2, 8]),
    Round([[], PROMPTS[5:]], [1, 6]),
]
# One request a rank: whether a step is replayed or not, which is chance, its rows are not padded,
# so it rounds alike.
GRAPH_ROUNDS = [Round([PROMPTS[:1], PROMPTS[1:2]], [6, 8]), Round([[], PROMPTS[2:3]], [1, 6])]
CAPTURE_SIZES = [1, 2]
Run = Callable[..., OfflineRun]


@pytest.fixture(scope="module")
def v4_run(tmp_path_factory: pytest.TempPathFactory, runs: EngineRuns) -> Iterator[Run]:
    """Return a run of two ranks, each made once; `grid` None is unpatched, and not compiled.

    tp: so many workers in each rank.
    """
    found: dict[Any, OfflineRun] = {}
    models: dict[bool, Path] = {}

    def run(
        grid: str | None = None, zeroed: bool = False, mode: str = "", tp: int = 1
    ) -> OfflineRun:
        key = grid, zeroed, mode, tp
        if zeroed not in models:
            models[zeroed] = v4.make(tmp_path_factory.mktemp("v4"), zeroed)
        if key not in found:
            compilation: dict[str, Any] = {"custom_ops": ["none", "+hc_head"]}
            env = {} if grid is None else {TOGGLE: "2", "OPROJ_GRID": grid}
            path: tuple[Path, ...] = ()
            if mode == "compiled":  # traced by Dynamo, run without code generation
                env |= {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0", "VLLM_CPU_CI_ENV": "1"}
            elif mode == "graphs":
                path = (PLUGIN,)
                compilation |= {
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": CAPTURE_SIZES,
                    "cudagraph_num_of_warmups": 1,
                }
            config = EngineConfig(
                models[zeroed],
                tp=tp,
                compiled=bool(mode),
                env=env,
                options={
                    "dtype": "bfloat16",
                    "tokenizer_mode": "hf",
                    "compilation_config": compilation,
                    "kernel_config": {"enable_jit_warmup": False},
                },
                extension="cpu_v4.V4WorkerProbe",
                python_path=(Path(__file__).parent, *path),
                start=warm.zygote(*path).start,
            )
            rounds = GRAPH_ROUNDS if mode == "graphs" or tp > 1 else ROUNDS
            found[key] = run_offline(config, rounds)
            assert_round_sizes(found[key], rounds)
        return found[key]

    yield run


def tokens(run: OfflineRun) -> list[list[int]]:
    return [completion.token_ids for completion in completions(run)]


def test_text_depends_on_wo_b(v4_run: Run) -> None:
    assert tokens(v4_run()) != tokens(v4_run(zeroed=True))


@pytest.mark.parametrize(("grid", "both"), [("auto", True), ("1x2", False)], ids=["both", "wo_b"])
def test_same_tokens(v4_run: Run, grid: str, both: bool) -> None:
    check(v4_run(), v4_run(grid), both)


def test_same_tokens_compiled(v4_run: Run) -> None:
    """The model is one graph on each rank; vLLM leaves V4 uncompiled unless it is told to."""
    off, on = v4_run(), v4_run("auto", mode="compiled")
    check(off, on, True)
    assert [worker["traced"] for worker in off.workers] == [0, 0]
    assert [worker["traced"] for worker in on.workers] == [1, 1]


def test_same_tokens_in_device_graphs(v4_run: Run) -> None:
    """Emulated: decodes are replayed whole, with the attention's kernels; prefills are eager."""
    off, on = v4_run(mode="graphs"), v4_run("auto", mode="graphs")
    check(off, on, True, least=1)
    for one, other in zip(off.workers, on.workers, strict=True):
        assert one["captures"] == other["captures"] >= len(CAPTURE_SIZES)
        assert one["replays"] > 0 and other["replays"] > 0


def test_same_tokens_with_tensor_parallelism(v4_run: Run) -> None:
    """TP=2 x DP=2: groups [0, 2] and [1, 3]; vLLM's own all-reduce follows ours."""
    off, on = v4_run(tp=2), v4_run("2x1", tp=2)
    check(off, on, True, least=8 + 2, tp=2)
    groups = {tuple(worker["status"]["otp_ranks"]) for worker in on.workers}
    assert groups == {(0, 2), (1, 3)}


def check(off: OfflineRun, on: OfflineRun, both: bool, least: int = 8 + 8 + 6, tp: int = 1) -> None:
    """The tokens are the same, and every worker holds half and exchanged at every layer.

    least: steps in Python of each worker, by default a step for each token of the longest answers.
    """
    assert tokens(on) == tokens(off)
    assert len(on.workers) == len(off.workers) == 2 * tp
    whole = (v4.BOTH_BYTES if both else v4.WO_B_BYTES) // tp
    for worker in on.workers:
        status = worker["status"]
        assert (status["layers"], status["grid"]) == (v4.LAYERS, "2x1" if both else "1x2")
        assert status["bytes_kept"] == status["bytes_saved"] == whole // 2
        held = sum(v["bytes"] for k, v in worker["layers"].items() if both or "wo_b" in k)
        assert held == whole // 2
        assert status["exchanges"] >= v4.LAYERS * least
        assert status["exchanges"] % v4.LAYERS == 0
    assert {worker["status"]["exchanges"] for worker in off.workers} == {0}
    told = "layers with their wo_a" if both else "layers is whole (the grid 1x2 cuts the outputs)"
    assert all(told in log for log in on.logs)
