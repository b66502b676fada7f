"""Runs of real engines, kept for the session because one serves several comparisons."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import model as demo_model
from demo.engines import (
    PROBE,
    Completion,
    EngineConfig,
    OfflineRun,
    Round,
    run_offline,
)

from ..hosts import wheels
from . import warm

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
PLUGIN = Path(__file__).resolve().parents[1] / "graphs" / "plugin"
SECOND_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
PROMPTS = demo_model.prompts(20)
MAX_TOKENS = 24
FEW_TOKENS = 8  # with four workers: vLLM's waiting processes spin, a step takes a second on 2 cores


@dataclass(frozen=True)
class Model:
    """Which checkpoint of `demo_model`."""

    variant: demo_model.Variant
    trained: bool


DENSE = Model("dense", trained=False)
MOE = Model("moe", trained=False)
STORY_TELLER = Model("dense", trained=True)


def max_tokens(dp: int, tp: int = 1) -> int:
    """Tokens of the longest answer in a layout."""
    return MAX_TOKENS if dp * tp == 2 else FEW_TOKENS


def spread(dp: int, tp: int = 1) -> list[Round]:
    """All prompts over `dp` ranks evenly; then very unevenly; then with idle ranks.

    In the second round rank 0 has one short request and is idle while the last rank works on;
    in the third every rank but the last has no request at all.
    """
    last = dp - 1
    most = max_tokens(dp, tp)
    even: list[Sequence[str]] = [PROMPTS[rank::dp] for rank in range(dp)]
    uneven: list[Sequence[str]] = [PROMPTS[rank : rank + 1] for rank in range(last)]
    uneven.append(PROMPTS[last:])
    idle: list[Sequence[str]] = [[] for _ in range(last)] + [PROMPTS[:4]]
    return [
        Round(even, [most] * dp),
        Round(uneven, [2 + rank for rank in range(last)] + [most]),
        Round(idle, [1] * last + [most // 2]),
    ]


@dataclass
class EngineRuns:
    """Starts engines for the tests of a session; the same run is never made twice."""

    scratch: Callable[[str], Path]
    _runs: dict[Any, OfflineRun] = field(default_factory=dict)
    _caches: dict[Any, Path] = field(default_factory=dict)

    def config(
        self,
        model: Model,
        *,
        otp: int | str | None,
        dp: int = 2,
        tp: int = 1,
        compiled: bool = False,
        release: str = "",
        grid: str = "",
        second: bool = False,
        **options: Any,
    ) -> EngineConfig:
        """Return a configuration; `otp` None is unpatched, `options` are vLLM's own.

        `release` is a vLLM release that is not the installed one. Compiled runs of one model,
        layout and release share their compile cache. `second` asks for vLLM's second model runner.
        """
        if compiled:
            # Scalar code compiles faster. The compiler does not see into a step of ours anyway.
            scalar = {"inductor_compile_config": {"cpp.simdlen": 1}}
            options = {"compilation_config": scalar, **options}
        moe = model.variant == "moe"
        # 0.28.0 prefills MLA by FlashAttention, which it cannot import on a CPU.
        env = {"VLLM_MLA_DISABLE": "1"} if release else {}
        path = tuple(wheels.ensure(wheels.Host("vllm", release))) if release else ()
        if second:
            path, env = (PLUGIN,), SECOND_RUNNER
        zygote = warm.zygote(*path, **env)
        if second:
            env = {**env, "VLLM_PLUGINS": "oproj_triton_tests,oproj_patch"}  # no graphs
            options = {"kernel_config": {"enable_jit_warmup": False}, **options}
        cache_key = (model, dp, tp, release)
        if compiled and cache_key not in self._caches:
            self._caches[cache_key] = self.scratch("compiled")
        return EngineConfig(
            demo_model.ensure(model.variant, trained=model.trained),
            dp=dp,
            tp=tp,
            compiled=compiled,
            env=env if otp is None else {**env, TOGGLE: str(otp), "OPROJ_GRID": grid},
            options=options,
            extension="cpu_moe.MoeWorkerProbe" if moe else PROBE,
            python_path=(Path(__file__).parent, *path) if moe else path,
            cache_root=self._caches[cache_key] if compiled else None,
            start=zygote.start,
        )

    def off(self, model: Model, **layout: Any) -> OfflineRun:
        """Return the unpatched run with two data-parallel ranks; `layout` as in `config`."""
        return self._run(model, None, **layout)

    def on(self, model: Model, otp: int, **layout: Any) -> OfflineRun:
        """Return a run with the shim; `layout` as in `config`."""
        return self._run(model, otp, **layout)

    def _run(
        self,
        model: Model,
        otp: int | None,
        dp: int = 2,
        tp: int = 1,
        compiled: bool = False,
        release: str = "",
        grid: str = "",
    ) -> OfflineRun:
        key = (model, otp, dp, tp, compiled, release, grid)
        if key not in self._runs:
            config = self.config(
                model,
                otp=otp,
                dp=dp,
                tp=tp,
                compiled=compiled,
                release=release,
                grid=grid,
            )
            self._runs[key] = run = run_offline(config, spread(dp, tp))
            assert_round_sizes(run, spread(dp, tp))
        run = self._runs[key]
        if otp is None:
            assert_unpatched(run.workers, run.logs, tp=tp)
        else:
            assert_sharded(run.workers, run.logs, dp=dp, otp=otp, tp=tp, grid=grid)
        return run


def completions(run: OfflineRun) -> list[Completion]:
    """All completions of a run, of all rounds and ranks."""
    return [c for rank in run.completions for entry in rank for c in entry]


def assert_same_tokens(off: OfflineRun, on: OfflineRun) -> None:
    """Each completion of `on` is token for token the unpatched one of the same prompt.

    The layouts may differ; what a rank answers does not depend on the other ranks.
    """
    assert_continued(off, completions(on))


def assert_continued(off: OfflineRun, on: Sequence[Completion]) -> None:
    """As `assert_same_tokens`, for completions that come from elsewhere.

    Completions of different lengths are compared as far as the shorter goes: they are greedy.
    """
    longest: dict[str, list[int]] = {}
    for completion in completions(off):
        if len(completion.token_ids) > len(longest.get(completion.prompt, [])):
            longest[completion.prompt] = completion.token_ids
    assert set(longest) == set(PROMPTS)
    for completion in on:
        expected = longest[completion.prompt]
        count = min(len(completion.token_ids), len(expected))
        assert count >= 1
        assert completion.token_ids[:count] == expected[:count], completion.prompt


def assert_round_sizes(run: OfflineRun, rounds: Sequence[Round]) -> None:
    """Every rank answered all its prompts of every round with as many tokens as asked for."""
    for number, entry in enumerate(rounds):
        for rank, answers in enumerate(run.completions):
            wanted = [(prompt, entry.max_tokens[rank]) for prompt in entry.prompts[rank]]
            assert [(c.prompt, len(c.token_ids)) for c in answers[number]] == wanted


def assert_unpatched(workers: list[dict[str, Any]], logs: Sequence[str], *, tp: int = 1) -> None:
    """No worker was touched, and every one holds whole o_proj weights (but for `tp`)."""
    for worker in workers:
        status = worker["status"]
        assert status["enabled"] is False
        assert status["exchanges"] == status["layers"] == 0
        assert len(worker["layers"]) == demo_model.NUM_LAYERS
        for layer in worker["layers"].values():
            assert layer["shape"] == [demo_model.HIDDEN_SIZE, demo_model.O_PROJ_IN // tp]
            assert layer["dtype"] == "float32"
        assert worker["o_proj_bytes"] == demo_model.O_PROJ_BYTES // tp
    assert not any("o_proj sharded" in log for log in logs)


def assert_sharded(
    workers: list[dict[str, Any]],
    logs: Sequence[str],
    *,
    dp: int,
    otp: int,
    tp: int = 1,
    grid: str = "",
    steps: int = 0,
) -> None:
    """Every worker of every rank holds 1/`otp`, says so, and exchanged.

    grid: or else Nx1; steps: of the model that each worker ran at least, or else those of `spread`.
    """
    assert sorted((w["dp_rank"], w["tp_rank"]) for w in workers) == [
        (d, t) for d in range(dp) for t in range(tp)
    ]
    kept = demo_model.O_PROJ_BYTES // tp // otp
    assert kept * otp * tp == demo_model.O_PROJ_BYTES
    for worker in workers:
        assert len(worker["layers"]) == demo_model.NUM_LAYERS
        for name, layer in worker["layers"].items():
            inputs, outputs = map(int, (grid or f"{otp}x1").split("x"))
            shape = [demo_model.HIDDEN_SIZE // outputs, demo_model.O_PROJ_IN // tp // inputs]
            assert layer["shape"] == shape, name
            assert layer["bytes"] == math.prod(shape) * 4
        assert worker["o_proj_bytes"] == kept
        status = worker["status"]
        first = worker["dp_rank"] // otp * otp
        assert status["enabled"] is True
        assert status["size"] == otp and status["grid"] == (grid or f"{otp}x1")
        assert list(status["otp_ranks"]) == [
            d * tp + worker["tp_rank"] for d in range(first, first + otp)
        ]
        assert status["layers"] == demo_model.NUM_LAYERS
        assert status["bytes_kept"] == kept
        assert status["bytes_saved"] == kept * (otp - 1)
        # At least one exchange a layer for each token of the longest request.
        least = steps or max_tokens(dp, tp)
        assert status["exchanges"] >= least * demo_model.NUM_LAYERS
        assert status["exchanges"] % demo_model.NUM_LAYERS == 0
    assert_info_lines(logs, workers=dp * tp, otp=otp, grid=grid or f"{otp}x1")


def assert_info_lines(logs: Sequence[str], *, workers: int, otp: int, grid: str) -> None:
    """Each worker said once, through vLLM's logger, how the o_proj layers are sharded."""
    found = re.findall(
        rf"INFO .*oproj_patch \S+: o_proj sharded {otp}-way over ranks \[[\d, ]+\]: "
        rf"{demo_model.NUM_LAYERS} layers, .*; grid {grid}",
        "\n".join(logs),
    )
    assert len(found) == workers, found
